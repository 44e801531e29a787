"""The supervisor: starts the trainer and the registrar, and outlives both.

``python -m ckpt_tasks.training.supervision.supervisor FOLDER LIVENESS_FD``. It lives in a session
of its own, so that what ends the launcher does not end it, and it ends the trainer when the
launcher is gone. It imports neither torch nor a registry. SIGTERM has the trainer save and stop,
SIGQUIT ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from math import inf
from typing import IO, Protocol

import msgspec

import ckpt_tasks
from ckpt_tasks.checkpointer.failures import tell_failure
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    EventLog,
    EventReader,
    Progress,
    Warned,
)
from ckpt_tasks.training.failure import death_failure, signal_name
from ckpt_tasks.training.spec import (
    CATCH_UP,
    NOT_REGISTERED,
    AttemptFolder,
    TrainOutcome,
    TrainSpec,
)
from ckpt_tasks.training.supervision.child import HURRY_SECONDS, Child
from ckpt_tasks.training.supervision.takeover import is_overtaken
from ckpt_tasks.training.supervision.trainers import Trainers, start_trainers
from ckpt_tasks.types import EXIT_FAILED, EXIT_STALE, EXIT_STOPPED, Position

__all__ = ["main"]

_POLL_SECONDS = 0.05
_REGISTRAR_STARTS = 5
_HEALTHY_SECONDS = 60.0  # a registrar that ran so long has its starts back
_FIRST_PAUSE = 1.0  # before a registrar is started again; each is twice the one before


class Supervisor:
    """Supervises one attempt.

    Parameters
    ----------
    liveness
        Descriptor whose other end only the launcher holds.
    """

    def __init__(self, folder: AttemptFolder, liveness: int) -> None:
        self._folder = folder
        folder.write_version(ckpt_tasks.__version__)
        self._spec = folder.read_spec()
        self._grace = self._spec.config.attempt.grace
        self._stop = threading.Event()
        self._at_once = threading.Event()
        self._orphaned = threading.Event()
        self._overdue = False
        self._parent = os.getppid()
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        signal.signal(signal.SIGINT, lambda *_: self._stop.set())
        signal.signal(signal.SIGQUIT, lambda *_: self._end_at_once())
        threading.Thread(target=self._watch, args=(liveness,), daemon=True).start()

    def run(self) -> int:
        """Supervise until the attempt is over; returns its exit code."""
        with self._folder.open_output() as output:
            trainers = start_trainers(self._folder, self._spec, output)
            registrar, keeper = self._start_registrar(output)
            self._tell_threads()
            self._wait(trainers, keeper)
            self._wait_for_writer(trainers, keeper)
            outcome = trainers.agree(self._outcome(trainers), self._has_time())
            trainers.close()
            self._folder.write_outcome(outcome, self._folder.outcome)
            if keeper is not None and registrar is not None:
                keeper.start_for_the_end()
                registrar.let_go()  # it empties its queue, then ends
                self._end(registrar)
        if self._orphaned.is_set():
            shutil.rmtree(self._folder.path, ignore_errors=True)
        return outcome.code

    def _start_registrar(
        self, output: IO[bytes]
    ) -> tuple[Child, RegistrarKeeper] | tuple[None, None]:
        """Only beside rank 0: it is one for each attempt."""
        if not self._spec.leads:
            return None, None
        registrar = Child(
            "ckpt_tasks.training.registration.registrar", self._folder, output, name="registrar"
        )
        return registrar, RegistrarKeeper(registrar, self._spec, self._tell)

    def _tell_threads(self) -> None:
        ranks = self._spec.nproc
        if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            self._tell(
                f"OMP_NUM_THREADS is not set, and is 1 for each of the {ranks} ranks, as torchrun "
                "has it; set it for more threads"
            )

    def _end_at_once(self) -> None:
        self._stop.set()
        self._at_once.set()

    def _end(self, registrar: Child) -> None:
        """Bound what the registrar may still take, and tell if it has not done all."""
        config = self._spec.config
        registrar.end(within=config.attempt.drain, hurry=self._at_once)
        if registrar.returncode != 0 and config.registry.tracking_uri is not None:
            limit = min(config.attempt.drain, HURRY_SECONDS if self._at_once.is_set() else inf)
            late = f"the registry has not taken all of it within {limit:g} s"
            died = f"the registrar ended with {registrar.returncode}"
            why = late if registrar.returncode == -signal.SIGKILL else died
            self._tell(f"{NOT_REGISTERED}: {why}. {CATCH_UP}")

    def _tell(self, message: str) -> None:
        log = EventLog(self._folder.registrar_events)
        log(Warned(message=message))
        log.close()

    def _watch(self, liveness: int) -> None:
        os.read(liveness, 1)  # returns when the launcher is gone
        self._orphaned.set()
        self._stop.set()

    def _wait(self, trainers: Trainers, keeper: RegistrarKeeper | None) -> None:
        """Until all trainers have ended: forward a stop, bound the grace, keep a registrar."""
        terminated = False
        deadline: float | None = None
        trainers.look()
        while trainers.are_running:
            if os.getppid() != self._parent:
                self._orphaned.set()
                self._stop.set()
            if self._stop.is_set() and not terminated:
                terminated = True
                deadline = time.monotonic() + self._grace
                trainers.terminate()
            if deadline is None and self._folder.trainer_outcome.exists():
                # A thread that the user's code has left running must not hold the attempt.
                deadline = time.monotonic() + self._grace
            if deadline is not None and time.monotonic() > deadline:
                self._overdue = True
                trainers.kill()
            if self._at_once.is_set():
                trainers.kill()
            if keeper is not None:
                keeper.look()
            time.sleep(_POLL_SECONDS)
            trainers.look()
        trainers.kill()  # loader workers that it left behind

    def _wait_for_writer(self, trainers: Trainers, keeper: RegistrarKeeper | None) -> None:
        """Until the save that was handed over is written, so that a retry finds it.

        Whoever asked for a stop waits no longer than the grace, and nobody longer than a save may
        take: the writer then goes on alone.
        """
        has_time = self._has_time()
        give_up_at = time.monotonic() + self._spec.config.attempt.max_unprotected
        told = False
        while self._folder.has_live_writer():
            if self._at_once.is_set():
                self._folder.end_writers()
            if not has_time() or time.monotonic() > give_up_at:
                return
            if not told and trainers.others_are_over:
                told = True
                with contextlib.suppress(OSError):  # then the writer waits, as for any rank
                    tell_failure(self._folder.failures, None, "no other rank runs any more")
            if keeper is not None:
                keeper.look()
            time.sleep(_POLL_SECONDS)

    def _has_time(self) -> Callable[[], bool]:
        """Whether one who asks again and again may still wait: after a stop, for the grace."""
        deadline: float | None = None

        def ask() -> bool:
            nonlocal deadline
            if self._stop.is_set() and deadline is None:
                at_once = self._overdue or self._at_once.is_set()
                deadline = time.monotonic() + (0.0 if at_once else self._grace)
            return deadline is None or time.monotonic() <= deadline

        return ask

    def _outcome(self, trainers: Trainers) -> TrainOutcome:
        outcome = trainers.said
        own = self._spec.place.rank if self._spec.place is not None else 0
        if outcome is not None and trainers.decisive == own:
            return outcome
        died = _died(self._spec, self._folder, trainers.returncode)
        if trainers.decisive != own:
            died = _of_rank(trainers.decisive, outcome or died, known=died)
        if outcome is not None:
            return died
        told_elsewhere = self._spec.place is not None and trainers.decisive != own
        if told_elsewhere or not self._stop.is_set():  # torchrun stops those that are left
            return self._stale(died) or died
        early = trainers.ended_by_signal or self._at_once.is_set()
        if died.attempt is None and early:
            # It was still starting, and did not listen to signals yet.
            return TrainOutcome(
                code=EXIT_STOPPED, message="stopped before it began", run=self._spec.run
            )
        if self._at_once.is_set():
            how = f"ended at once, without another save ({died.message}); run it again to go on"
            return msgspec.structs.replace(died, message=how, ended_with=None)
        if not self._overdue:
            return died
        late = f"{died.message}; it had not stopped within {self._grace:g} s"
        if self._folder.has_live_writer():
            late += ", and the save under way may yet become a checkpoint"
        # This end was made here: the training has no part in it.
        return msgspec.structs.replace(died, message=late, ended_with=None)

    def _stale(self, died: TrainOutcome) -> TrainOutcome | None:
        """The outcome of a trainer that was ended by a later attempt."""
        if died.attempt is None or not is_overtaken(self._spec, died.attempt):
            return None
        message = f"attempt {died.attempt + 1} has taken the run over: {died.message}"
        return msgspec.structs.replace(died, code=EXIT_STALE, message=message, ended_with=None)


class Restartable(Protocol):
    """A child as `RegistrarKeeper` needs it."""

    def has_failed(self) -> bool: ...

    def restart(self) -> None: ...


class RegistrarKeeper:
    """Starts a registrar that died again, after growing pauses; if it dies again and again, tells
    so, and leaves it.

    Parameters
    ----------
    tell
        Told in a sentence what that costs.
    """

    def __init__(
        self,
        registrar: Restartable,
        spec: TrainSpec,
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registrar = registrar
        self._config = spec.config
        self._tell = tell
        self._clock = clock
        self._starts = 1
        self._started = clock()
        self._start_at: float | None = None
        self._gave_up = False

    def look(self) -> None:
        """Do what is due; to be called again and again."""
        if self._gave_up or not self._registrar.has_failed():
            return
        now = self._clock()
        if self._start_at is None:
            self._note_death(now)
        elif now >= self._start_at:
            self._start(now)

    def start_for_the_end(self) -> None:
        """The trainer has ended: what is still to be published waits for no pause."""
        if not self._gave_up and self._registrar.has_failed():
            self._start(self._clock())

    def _start(self, now: float) -> None:
        self._starts += 1
        self._started, self._start_at = now, None
        with contextlib.suppress(OSError):  # there is no memory for it: it counts as one that died
            self._registrar.restart()

    def _note_death(self, now: float) -> None:
        if now - self._started >= _HEALTHY_SECONDS:
            self._starts = 1
        if self._starts < _REGISTRAR_STARTS:
            self._start_at = now + _FIRST_PAUSE * 2 ** (self._starts - 1)
            return
        self._gave_up = True
        after = self._config.attempt.takeover_after
        registers = self._config.registry.tracking_uri is not None
        lost = f" Nothing more of this attempt is registered. {CATCH_UP}." if registers else ""
        self._tell(
            f"the registrar died {self._starts} times and is not started again: training goes on "
            f"without a heartbeat, so after {after:g} s another invocation may take the run over."
            f"{lost}"
        )


def _of_rank(rank: int, outcome: TrainOutcome, *, known: TrainOutcome) -> TrainOutcome:
    """An end that says which rank's it is, with what rank 0 has reported of the attempt."""
    return msgspec.structs.replace(
        outcome,
        message=f"rank {rank}: {outcome.message}",
        uid=known.uid,
        attempt=known.attempt,
        checkpoint=known.checkpoint,
    )


def _died(spec: TrainSpec, folder: AttemptFolder, returncode: int) -> TrainOutcome:
    """The outcome of a trainer that could not say it itself, from what it had reported."""
    attempt: int | None = None
    uid = checkpoint = None
    position: Position | None = None
    for log in (folder.trainer_events, folder.writer_events):
        for event in EventReader(log).read():
            if isinstance(event, AttemptClaimed):
                attempt, uid = event.attempt, event.uid
            elif isinstance(event, AttemptResumed | CheckpointCommitted):
                checkpoint = event.checkpoint
                position = max(position or event.position, event.position, key=lambda p: p.step)
            elif isinstance(event, Progress):
                position = event.position
    how = (
        f"was killed by {signal_name(-returncode)}"
        if returncode < 0
        else f"exited with {returncode}"
    )
    where = f"at {position}" if position else "before it trained"
    return TrainOutcome(
        code=EXIT_FAILED,
        message=(f"the trainer {how} {where}; newest checkpoint: {checkpoint or 'none'}"),
        run=spec.run,
        uid=uid,
        attempt=attempt,
        position=position,
        checkpoint=checkpoint,
        ended_with=death_failure(returncode, position),
    )


def main() -> int:
    return Supervisor(AttemptFolder(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
