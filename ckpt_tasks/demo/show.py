"""The show: what happens, as it happens, and the proof at the end."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.proof import prove, train_uninterrupted
from ckpt_tasks.demo.stage import KILLS, RUN, Stage
from ckpt_tasks.demo.with_airflow import WithAirflow
from ckpt_tasks.demo.with_prefect import WithPrefect
from ckpt_tasks.errors import ConfigError

__all__ = ["main"]

_MARKER = ".ckpt-tasks-demo"
_DEFAULT_FOLDER = "demo-run"


class Orchestrator(Protocol):
    """What runs the training that is killed, and retries it."""

    title: str
    """What it makes of the training: ``a Prefect flow``."""

    def show(self, stage: Stage) -> AbstractContextManager[list[int]]:
        """Run it to its end; within the block its pages can still be looked at.

        Yields the numbers of the killed attempts.
        """
        ...

    def where_to_look(self, stage: Stage) -> str:
        """How its part can be looked at later."""
        ...


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 when the proof holds."""
    parser = argparse.ArgumentParser(
        prog="ckpt-tasks demo",
        description="Train a digits classifier under an orchestrator while its process is killed "
        "twice; then prove that it ended as one that was never killed. Takes a minute or two.",
        # The command line looks for the whole word, to tell what has to be installed.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--folder",
        default=_DEFAULT_FOLDER,
        help=f"where everything is kept; default: {_DEFAULT_FOLDER}",
    )
    parser.add_argument("--airflow", action="store_true", help="under Airflow, not Prefect")
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    orchestrator: Orchestrator = WithAirflow() if given.airflow else WithPrefect()
    stage = Stage(Path(given.folder).absolute(), Account())
    return _run(stage, orchestrator)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End as an exception does: through the blocks that end the servers."""
    sys.exit(128 + number)


def _run(stage: Stage, orchestrator: Orchestrator) -> int:
    say, heading = stage.account.say, stage.account.heading
    _clean(stage.folder)
    say("", f"A digits classifier is trained as {orchestrator.title}, with a checkpoint every")
    say("", f"20 steps. Its process will be killed with SIGKILL {KILLS} times.")
    heading("1. What an uninterrupted training ends with")
    expected = train_uninterrupted(stage)
    heading(f"2. The same training as {orchestrator.title}, killed on the way")
    with orchestrator.show(stage) as killed:
        heading("3. The proof")
        holds = prove(stage, expected, killed)
        heading("4. Look at it")
        say("", "MLflow:   mlflow ui --backend-store-uri " + stage.tracking_uri)
        say("", "          (in this repository: make ui), experiment 'digits'")
        say("", orchestrator.where_to_look(stage))
        say("", f"Store:    ckpt-tasks ls {RUN} --store {stage.store_url}")
    return 0 if holds else 1


def _clean(folder: Path) -> None:
    """Remove an earlier showing; never a folder that is something else."""
    marker = folder / _MARKER
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ConfigError(f"{folder} is not empty and not a demo's; use --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
