"""The supervisor: starts the trainer and the registrar, and outlives both.

``python -m ckpt_tasks.training.supervisor FOLDER LIVENESS_FD``. It lives in a session of its
own, so that what ends the launcher does not end it, and it ends the trainer when the launcher
is gone. It imports neither torch nor a registry.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    EventLog,
    EventReader,
    Progress,
    Warned,
)
from ckpt_tasks.training.spec import (
    CATCH_UP,
    NOT_REGISTERED,
    AttemptFolder,
    TrainOutcome,
    TrainSpec,
)
from ckpt_tasks.types import EXIT_FAILED, Position

__all__ = ["main"]

_POLL_SECONDS = 0.05
_REGISTRAR_STARTS = 5


class Supervisor:
    """Supervises one attempt.

    Parameters
    ----------
    liveness
        Descriptor whose other end only the launcher holds.
    """

    def __init__(self, folder: AttemptFolder, liveness: int) -> None:
        self._folder = folder
        self._spec = folder.read_spec()
        self._grace = self._spec.config.attempt.grace
        self._stop = threading.Event()
        self._orphaned = threading.Event()
        self._parent = os.getppid()
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        signal.signal(signal.SIGINT, lambda *_: self._stop.set())
        threading.Thread(target=self._watch, args=(liveness,), daemon=True).start()

    def run(self) -> int:
        """Supervise until the attempt is over; returns its exit code."""
        with self._folder.output.open("ab", buffering=0) as output:
            trainer = _Child("ckpt_tasks.training.trainer", self._folder, output)
            registrar = _Child("ckpt_tasks.training.registrar", self._folder, output)
            self._wait(trainer, registrar, output)
            outcome = self._outcome(trainer)
            self._folder.write_outcome(outcome, self._folder.outcome)
            registrar.let_go()  # it empties its queue, then ends
            self._end(registrar)
        if self._orphaned.is_set():
            shutil.rmtree(self._folder.path, ignore_errors=True)
        return outcome.code

    def _end(self, registrar: _Child) -> None:
        """Bound what the registrar may still take, and tell if it has not done all."""
        config = self._spec.config
        registrar.end(within=config.attempt.drain)
        if registrar.process.returncode != 0 and config.registry.tracking_uri is not None:
            late = f"the registry has not taken all of it within {config.attempt.drain:g} s"
            died = f"the registrar ended with {registrar.process.returncode}"
            why = late if registrar.process.returncode == -signal.SIGKILL else died
            tell = EventLog(self._folder.registrar_events)
            tell(Warned(message=f"{NOT_REGISTERED}: {why}. {CATCH_UP}"))
            tell.close()

    def _watch(self, liveness: int) -> None:
        os.read(liveness, 1)  # returns when the launcher is gone
        self._orphaned.set()
        self._stop.set()

    def _wait(self, trainer: _Child, registrar: _Child, output: IO[bytes]) -> None:
        """Until the trainer has ended: forward a stop, bound the grace, keep a registrar."""
        starts = 1
        deadline: float | None = None
        while trainer.process.poll() is None:
            if os.getppid() != self._parent:
                self._orphaned.set()
                self._stop.set()
            if self._stop.is_set() and deadline is None:
                deadline = time.monotonic() + self._grace
                trainer.process.terminate()
            if deadline is not None and time.monotonic() > deadline:
                trainer.kill()
            if registrar.process.poll() not in (None, 0) and starts < _REGISTRAR_STARTS:
                starts += 1
                registrar.restart(output)
            time.sleep(_POLL_SECONDS)
        trainer.kill()  # loader workers that it left behind

    def _outcome(self, trainer: _Child) -> TrainOutcome:
        outcome = self._folder.read_outcome(self._folder.trainer_outcome)
        return outcome or _died(self._spec, self._folder, trainer, self._stop.is_set())


class _Child:
    """A child in a process group of its own, which it leaves when this process is gone."""

    def __init__(self, module: str, folder: AttemptFolder, output: IO[bytes]) -> None:
        self._module = module
        self._folder = folder
        self._start(output)

    def _start(self, output: IO[bytes]) -> None:
        read, self._liveness = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._folder.path), str(read)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[read],
            process_group=0,
        )
        os.close(read)

    def restart(self, output: IO[bytes]) -> None:
        os.close(self._liveness)
        self._start(output)

    def let_go(self) -> None:
        """Close the liveness pipe: the child learns that nothing more will come."""
        os.close(self._liveness)

    def end(self, *, within: float) -> None:
        """Wait for the child, for `within` seconds at most."""
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the whole group at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _died(spec: TrainSpec, folder: AttemptFolder, trainer: _Child, stopping: bool) -> TrainOutcome:
    """The outcome of a trainer that could not say it itself, from what it had reported."""
    attempt: int | None = None
    uid = checkpoint = None
    position: Position | None = None
    for event in EventReader(folder.trainer_events).read():
        if isinstance(event, AttemptClaimed):
            attempt, uid = event.attempt, event.uid
        elif isinstance(event, AttemptResumed | CheckpointCommitted):
            checkpoint, position = event.checkpoint, event.position
        elif isinstance(event, Progress):
            position = event.position
    code = trainer.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    where = f" at {position}" if position else " before it trained"
    late = f"; it had not stopped within {spec.config.attempt.grace:g} s" if stopping else ""
    return TrainOutcome(
        code=EXIT_FAILED,
        message=f"the trainer {how}{where}{late}; newest checkpoint: {checkpoint or 'none'}",
        run=spec.run,
        uid=uid,
        attempt=attempt,
        position=position,
        checkpoint=checkpoint,
    )


def main() -> int:
    return Supervisor(AttemptFolder(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
