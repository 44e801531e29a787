"""A supervised process of an attempt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.training.spec import AttemptFolder

__all__ = ["HURRY_SECONDS", "Child"]

HURRY_SECONDS = 5.0
"""What a child may take, when somebody does not want to wait."""

_POLL_SECONDS = 0.05
_DEATH_SECONDS = 5.0


class Child:
    """A child in a process group of its own, which it leaves when this process is gone.

    Parameters
    ----------
    module
        What it runs: ``python -m MODULE FOLDER LIVENESS_FD ARGUMENTS``.
    name
        Under which the folder knows it.
    environment
        Variables besides this process's own.
    """

    def __init__(
        self,
        module: str,
        folder: AttemptFolder,
        output: IO[bytes],
        *,
        name: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._folder = folder
        self._output = output
        self._name = name
        self._arguments = arguments
        self._environment = {**os.environ, **(environment or {})}
        self._liveness: int | None = None
        self._unkillable = False
        self._start()

    def _start(self) -> None:
        read, self._liveness = os.pipe()
        try:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", self._module, str(self._folder.path), str(read)),
                    *self._arguments,
                ],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[read],
                process_group=0,
            )
        finally:
            os.close(read)
        with contextlib.suppress(OSError):  # a full disk must not end a training
            self._folder.write_process(self._name, this_process(self.process.pid))

    @property
    def returncode(self) -> int | None:
        """Negative for a signal; ``None`` while it runs.

        One that was killed while it stands in the kernel, before a file system that does not
        answer, has ended, too: it dies when that does, and comes back to no code of its own.
        """
        returned = self.process.poll()
        return -signal.SIGKILL if returned is None and self._unkillable else returned

    def has_failed(self) -> bool:
        """It has ended, and not because its work was done."""
        return self.returncode not in (None, 0)

    def restart(self) -> None:
        """Raises ``OSError`` where the system cannot start one now."""
        self.let_go()
        self._start()
        self._unkillable = False

    def let_go(self) -> None:
        """Close the liveness pipe: the child learns that nothing more will come."""
        if self._liveness is not None:
            os.close(self._liveness)
            self._liveness = None

    def end(self, *, within: float, hurry: threading.Event) -> None:
        """Wait for the child, for `within` seconds at most, and a few once there is a `hurry`."""
        started = time.monotonic()
        hurried: float | None = None
        while self.returncode is None:
            now = time.monotonic()
            if hurry.is_set() and hurried is None:
                hurried = now
            if now - started > within or (hurried is not None and now - hurried > HURRY_SECONDS):
                self.kill()
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End the whole group at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.returncode is None:
            try:
                self.process.wait(_DEATH_SECONDS)
            except subprocess.TimeoutExpired:
                self._unkillable = True
