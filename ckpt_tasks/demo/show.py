"""The show: what happens, as it happens, and the proof at the end."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.checkpointer.verify import state_digest
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.demo.killer import Killer
from ckpt_tasks.demo.prefect_server import prefect_environment, prefect_server
from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["main"]

_KILLS = 2
_MARKER = ".ckpt-tasks-demo"
_LOG_LINE = re.compile(r"^[\d:.]+ \| \w+\s+\| (Task|Flow) run '([^']+)' - (.*)$")
_CHECKPOINT = re.compile(r"^step-\d+-a\d+-s\d+ (committed|registered)")
_RETRY = re.compile(r"^Task run failed .*?\(['\"](.*)['\"]\) - (Retry .*)$")
_NOISE = ("Created task", "Beginning", "Executing", "Finished in state Completed")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 when the proof holds."""
    parser = argparse.ArgumentParser(
        prog="ckpt-tasks demo",
        description="Train a digits classifier as a Prefect flow whose process is killed twice; "
        "then prove that it ended as one that was never killed. Takes a minute or two.",
    )
    parser.add_argument(
        "--folder", default="demo-run", help="where everything is kept; default: demo-run"
    )
    folder = Path(parser.parse_args(arguments).folder).absolute()
    return Demo(folder).run()


class Demo:
    """One showing, with everything it makes in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._store_url = str(folder / "store")
        self._tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
        self._counts = {"committed": 0, "registered": 0}

    def run(self) -> int:
        self._clean()
        self._say("", "A digits classifier is trained as a Prefect flow, with a checkpoint every")
        self._say("", f"20 steps. Its process will be killed with SIGKILL {_KILLS} times.")
        self._heading("1. What an uninterrupted training ends with")
        expected = self._train_uninterrupted()
        self._heading("2. The same training as a Prefect flow, killed on the way")
        with prefect_server(self._folder / "prefect") as api:
            self._say("prefect", f"server is up: {api}")
            killed = self._run_flow(api)
        self._heading("3. The proof")
        holds = self._prove(expected, killed)
        self._tell_where_to_look()
        return 0 if holds else 1

    def _clean(self) -> None:
        """Remove an earlier showing; never a folder that is something else."""
        marker = self._folder / _MARKER
        if self._folder.exists() and any(self._folder.iterdir()):
            if not marker.exists():
                raise ConfigError(f"{self._folder} is not empty and not a demo's; use --folder")
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        marker.touch()

    def _train_uninterrupted(self) -> str:
        spec = TrainSpec(
            entrypoint="ckpt_tasks.demo.digits:train",
            run="uninterrupted",
            invocation="demo-reference",
            config=CheckpointConfig(
                store=StoreConfig(url=self._store_url), schedule=ScheduleConfig(final=True)
            ),
        )
        outcome = launch(spec)
        if not outcome.done:
            raise CkptTasksError(f"the uninterrupted training failed: {outcome.message}")
        self._say("train", outcome.message)
        return self._digest("uninterrupted")

    def _digest(self, run: str) -> str:
        with open_store(self._store_url) as store:
            newest = view_run(store, run).newest
            if newest is None:
                raise CkptTasksError(f"run {run!r} has no checkpoint in {self._store_url}")
            return state_digest(store, run, newest.id)

    def _run_flow(self, api: str) -> list[int]:
        """Run the flow in a process of its own, relay what it says, and kill its trainer."""
        command = [sys.executable, "-m", "ckpt_tasks.demo.flow"]
        environment = prefect_environment(self._folder / "prefect") | {"PREFECT_API_URL": api}
        with open_store(self._store_url) as store:
            killer = Killer(store, "digits", kills=_KILLS, on_kill=self._on_kill)
            flow = subprocess.Popen(
                [*command, self._store_url, self._tracking_uri, "digits"],
                env=environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            killer.start()
            try:
                assert flow.stdout is not None
                self._relay(flow.stdout)
                code = flow.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    flow.terminate()
                flow.wait()
                killer.stop()
        if code != 0:
            raise CkptTasksError(f"the flow failed; see {self._folder / 'flow.log'}")
        return killer.killed

    def _relay(self, output: IO[str]) -> None:
        with (self._folder / "flow.log").open("w", encoding="utf-8") as log:
            for line in output:
                log.write(line)
                match = _LOG_LINE.match(line)
                if match:
                    who = "flow" if match[1] == "Flow" else match[2].rpartition("-")[0]
                    self._relay_line(who, match[3])

    def _relay_line(self, who: str, text: str) -> None:
        """Show what matters of a line; checkpoints are counted, and told of with each epoch."""
        checkpoint = _CHECKPOINT.match(text)
        if checkpoint:
            self._counts[checkpoint[1]] += 1
            return
        if text.startswith(_NOISE):
            return
        retry = _RETRY.match(text)
        if retry:
            self._say(who, retry[1])
            self._say(who, retry[2])
        elif text.startswith("epoch"):
            counts = f"{self._counts['committed']} checkpoints, {self._counts['registered']}"
            self._say(who, f"{text}   ({counts} registered)")
        else:
            self._say(who, text)

    def _on_kill(self, number: int, attempt: int, pid: int, newest: str) -> None:
        self._say(
            "KILL",
            f"SIGKILL {number} of {_KILLS}: attempt {attempt}, process {pid} "
            f"(newest checkpoint {newest})",
        )

    def _prove(self, expected: str, killed: list[int]) -> bool:
        actual = self._digest("digits")
        with open_store(self._store_url) as store:
            view = view_run(store, "digits")
        for line in _attempt_lines(view, killed):
            self._say("", line)
        self._say("", f"{self._counts['registered']} checkpoints registered in MLflow")
        self._say("", f"final state, never killed:   {expected}")
        self._say("", f"final state, killed {len(killed)} times: {actual}")
        holds = expected == actual and len(killed) == _KILLS
        self._say("", "IDENTICAL, bit for bit." if holds else "THEY DIFFER.")
        return holds

    def _tell_where_to_look(self) -> None:
        folder = self._folder
        self._heading("4. Look at it")
        self._say("", "MLflow:   mlflow ui --backend-store-uri " + self._tracking_uri)
        self._say("", "          (in this repository: make ui), experiment 'digits'")
        self._say("", f"Prefect:  PREFECT_HOME={folder / 'prefect'} prefect server start")
        self._say("", f"Store:    ckpt-tasks ls digits --store {self._store_url}")

    def _heading(self, text: str) -> None:
        with self._lock:
            print(f"\n{text}", flush=True)

    def _say(self, who: str, text: str) -> None:
        seconds = time.monotonic() - self._started
        with self._lock:
            print(f"  {seconds:6.1f}s  {who:<9} {text}".rstrip(), flush=True)


def _attempt_lines(view: RunView, killed: list[int]) -> list[str]:
    lines = []
    for attempt in view.attempts:
        start = attempt.resumed.checkpoint if attempt.resumed else None
        end = "killed" if attempt.number in killed else "trained to the end"
        lines.append(f"attempt {attempt.number}: from {start or 'the beginning'}, {end}")
    return lines
