"""Kills the trainer of a run with SIGKILL, at steps that nobody announces."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.process import process_is_alive
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Process
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Killer"]

_POLL_SECONDS = 0.05


class Killer:
    """Kills one attempt after the other, each once it has committed a few checkpoints.

    Parameters
    ----------
    kills
        How many.
    on_kill
        Told each time: which kill, the attempt's number, the trainer's pid, and its newest
        checkpoint.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        kills: int,
        on_kill: Callable[[int, int, int, str], None],
    ) -> None:
        self._store = store
        self._layout = RunLayout(run)
        self._kills = kills
        self._on_kill = on_kill
        self._random = random.SystemRandom()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self.killed: list[int] = []
        """Attempts that were killed."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        wanted = self._random.randint(2, 4)
        while len(self.killed) < self._kills and not self._stopped.wait(_POLL_SECONDS):
            attempts = read_attempts(self._store, self._layout)
            if not attempts or attempts[-1].number in self.killed or attempts[-1].claim is None:
                continue
            number = attempts[-1].number
            if len(self._committed(number)) < wanted:
                continue
            self._stopped.wait(self._random.uniform(0.0, 0.4))
            self._kill(number, attempts[-1].claim.process)
            wanted = self._random.randint(2, 4)

    def _committed(self, attempt: int) -> list[CheckpointId]:
        found = list_checkpoints(self._store, self._layout)
        return [checkpoint for checkpoint in found if checkpoint.attempt == attempt]

    def _kill(self, attempt: int, process: Process) -> None:
        if not process_is_alive(process):
            return
        os.kill(process.pid, signal.SIGKILL)
        self.killed.append(attempt)
        while process_is_alive(process) and not self._stopped.wait(_POLL_SECONDS):
            pass  # a commit under way may still take effect
        newest = str(max(self._committed(attempt)))
        self._on_kill(len(self.killed), attempt, process.pid, newest)
