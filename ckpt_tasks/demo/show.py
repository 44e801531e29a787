"""The show: what happens, as it happens, and the proof at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.commands import command_line, short_path
from ckpt_tasks.demo.proof import prove, train_uninterrupted
from ckpt_tasks.demo.stage import DATABASE, KILLS, RUN, STORE, Stage
from ckpt_tasks.demo.with_airflow import WithAirflow
from ckpt_tasks.demo.with_prefect import WithPrefect
from ckpt_tasks.errors import ConfigError

__all__ = ["main"]

_MARKER = ".ckpt-tasks-demo"
_DEFAULT_FOLDER = "demo-run"
_STDERR = 2
_INTERRUPTED = b"""
interrupted: ending all that the demo has started, which takes up to half a minute ...
"""
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Orchestrator(Protocol):
    """What runs the training that is killed, and retries it."""

    name: str
    title: str
    """What it makes of the training: ``a Prefect flow``."""
    options: tuple[str, ...]
    """Choose it on the command line."""
    home: str
    """The part of the stage's folder that it keeps its own things in."""

    def show(self, stage: Stage) -> AbstractContextManager[list[int]]:
        """Run it to its end; within the block its pages can still be looked at.

        Yields the numbers of the killed attempts.
        """
        ...

    def look(self, stage: Stage) -> None:
        """Show the pages of an earlier showing until they have been seen."""
        ...


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 when the proof holds."""
    given = _parser().parse_args(arguments)
    orchestrator: Orchestrator = WithAirflow() if given.airflow else WithPrefect()
    stage = Stage(Path(given.folder).absolute(), Account())
    with _ending_on_signals():
        return _look(stage, orchestrator) if given.look else _run(stage, orchestrator)


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--look", action="store_true", help="only show the pages of the last demo once more"
    )
    return parser


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """End as an exception does: through the blocks that end the servers."""
    # Who started this may have it ignore some: `nohup`, and a shell for what it runs with `&`.
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # Not `print`: what this interrupts may be just that.
    os.write(_STDERR, _INTERRUPTED)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _look(stage: Stage, orchestrator: Orchestrator) -> int:
    folder = stage.folder
    # Without the marker it may be the home of an Airflow that is none of the demo's business.
    if not ((folder / _MARKER).exists() and (folder / orchestrator.home).is_dir()):
        demo = command_line("ckpt-tasks", "demo", *orchestrator.options, *_folder_option(folder))
        raise ConfigError(
            f"in {folder} there is no demo under {orchestrator.name} to look at; first: {demo}"
        )
    orchestrator.look(stage)
    return 0


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
        for what, command in _ways_to_look(stage.folder, orchestrator).items():
            say("", f"{what + ':':<9} {command}")
    return 0 if holds else 1


def _ways_to_look(folder: Path, orchestrator: Orchestrator) -> dict[str, str]:
    database = f"sqlite:///{short_path(folder / DATABASE)}"
    pages = (*orchestrator.options, "--look", *_folder_option(folder))
    return {
        "MLflow": command_line("mlflow", "ui", "--backend-store-uri", database),
        orchestrator.name: command_line("ckpt-tasks", "demo", *pages),
        "Store": command_line("ckpt-tasks", "ls", RUN, "--store", short_path(folder / STORE)),
    }


def _folder_option(folder: Path) -> tuple[str, ...]:
    return () if folder == Path(_DEFAULT_FOLDER).absolute() else ("--folder", short_path(folder))


def _clean(folder: Path) -> None:
    """Remove an earlier showing; never a folder that is something else."""
    marker = folder / _MARKER
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ConfigError(f"{folder} is not empty and not a demo's; use --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
