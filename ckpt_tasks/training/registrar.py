"""The registrar: heartbeat, metrics and registration, in a process beside the trainer.

``python -m ckpt_tasks.training.registrar FOLDER LIVENESS_FD``. It follows the trainer's events,
so a trainer that is killed costs it nothing: what was reported is still published. The registry
is imported here and nowhere else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ckpt_tasks.errors import (
    ConfigError,
    CorruptCheckpointError,
    RegistryError,
    StaleAttemptError,
    StoreError,
)
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    Event,
    EventLog,
    EventReader,
    MetricsLogged,
    Progress,
    RegistryUnavailable,
    RunFoundComplete,
    Warned,
)
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import Heart
from ckpt_tasks.fencing.process import process_is_alive, this_process
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import AttemptClaim
from ckpt_tasks.registry import RunDescription, RunStatus, load_registry
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.publisher import Publisher
from ckpt_tasks.training.spec import CATCH_UP, NOT_REGISTERED, AttemptFolder
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED, Position, Scalar

__all__ = ["main"]

_POLL_SECONDS = 0.2
_STATUS_OF: dict[int, RunStatus] = {EXIT_DONE: "finished", EXIT_STOPPED: "stopped"}
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 8.0
_FIRST_SILENCE, _LONGEST_SILENCE = 5.0, 600.0  # between two messages that the registry is away


class Registrar:
    """Follows one attempt until it has ended and everything is published.

    Parameters
    ----------
    liveness
        Descriptor whose other end only the supervisor holds.
    """

    def __init__(self, folder: AttemptFolder, liveness: int) -> None:
        self._folder = folder
        self._spec = folder.read_spec()
        self._events = EventReader(folder.trainer_events)
        self._emit = EventLog(folder.registrar_events)
        self._layout = RunLayout(self._spec.run)
        self._released = threading.Event()
        self._claimed: AttemptClaimed | RunFoundComplete | None = None
        self._store: Store | None = None
        self._heart: Heart | None = None
        self._publisher: Publisher | None = None
        self._retry_at = 0.0
        self._backoff = _FIRST_BACKOFF
        self._told_away = False
        self._tell_at = 0.0
        self._silence = _FIRST_SILENCE
        self._deadline: float | None = None
        threading.Thread(target=self._watch, args=(liveness,), daemon=True).start()

    def run(self) -> int:
        """Returns when there is nothing left to do, or another attempt owns the run."""
        try:
            self._follow()
            self._note_failure()
            self._drain()
        except StaleAttemptError as error:
            self._emit(Warned(message=f"nothing more is published: {error}"))
        finally:
            if self._heart is not None:
                # Should this process fail, the attempt goes on, and so will the next registrar.
                self._heart.stop(ended=self._is_over())
        return 0

    def _watch(self, liveness: int) -> None:
        os.read(liveness, 1)  # returns when the trainer has ended, or the supervisor is gone
        self._released.set()

    def _follow(self) -> None:
        """While the attempt lives."""
        while not self._is_over():
            self._handle_events()
            self._publish()
            self._released.wait(_POLL_SECONDS)
        self._handle_events()

    def _is_over(self) -> bool:
        """The supervisor says so; or it is gone itself, and the trainer is gone too."""
        if not self._released.is_set():
            return False
        if self._folder.outcome.exists() or not isinstance(self._claimed, AttemptClaimed):
            return True
        return not process_is_alive(this_process(self._claimed.pid))

    def _handle_events(self) -> None:
        for event in self._events.read():
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, AttemptClaimed):
            self._begin(event)
        elif isinstance(event, RunFoundComplete):
            self._claimed = event
            self._store = open_store(self._spec.config.store)
            self._open_publisher()
        elif isinstance(event, AttemptResumed):
            self._note_step(event.position)
            self._open_publisher()
        elif isinstance(event, Progress):
            self._note_step(event.position)
        elif self._publisher is None:
            return
        elif isinstance(event, MetricsLogged):
            self._publisher.add_rows(event.rows)
        elif isinstance(event, CheckpointCommitted):
            self._publisher.add_commit(event.checkpoint)

    def _note_step(self, position: Position) -> None:
        if self._heart is not None:
            self._heart.step = position.step

    def _note_failure(self) -> None:
        """Before the drain, which may be cut short: later attempts compare their own end."""
        outcome = self._folder.read_outcome(self._folder.outcome)
        if self._heart is not None and outcome is not None:
            self._heart.failure = outcome.ended_with

    def _begin(self, claimed: AttemptClaimed) -> None:
        self._claimed = claimed
        self._store = open_store(self._spec.config.store)
        self._heart = Heart(
            self._store,
            self._layout,
            claimed.attempt,
            interval=self._spec.config.attempt.heartbeat,
        )
        self._heart.start()

    def _open_publisher(self) -> None:
        config = self._spec.config.registry
        if config.tracking_uri is None:
            return
        claimed, store = self._claimed, self._store
        assert claimed is not None
        assert store is not None
        try:
            registry = load_registry(config)
        except ConfigError as error:
            self._give_up(error)
            return
        self._publisher = Publisher(
            store,
            self._layout,
            Fence(store, self._layout, claimed.attempt),
            registry,
            config,
            self._describe(claimed, store),
            self._emit,
            follows=isinstance(claimed, AttemptClaimed),
        )

    def _describe(self, claimed: AttemptClaimed | RunFoundComplete, store: Store) -> RunDescription:
        return RunDescription(
            run=claimed.run,
            uid=claimed.uid,
            store_url=store.url,
            hyperparameters=self._hyperparameters(claimed.attempt, store),
            entrypoint=self._spec.entrypoint,
            tags=self._spec.tags,
        )

    def _hyperparameters(self, attempt: int, store: Store) -> dict[str, Scalar]:
        """As the trainer recorded them, with the defaults that held."""
        path = self._layout.attempt(attempt)
        try:
            claim = decode(store.read(path, limit=MAX_RECORD_BYTES), AttemptClaim, path=path)
        except CorruptCheckpointError as error:
            self._emit(Warned(message=f"hyperparameters are not published: {error}"))
            return {}
        return claim.hyperparameters

    def _publish(self, *, last: bool = False) -> bool:
        """Publish what waits, unless the registry is being left alone for a while.

        With `last`, close the run as well. Returns whether nothing is left to do.
        """
        if self._publisher is None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._publisher.publish()
            if last:
                self._publisher.end(self._status())
        except ConfigError as error:
            self._give_up(error)
        except (RegistryError, StoreError) as error:
            self._tell_away(str(error), self._publisher.queued)
            self._retry_at = time.monotonic() + self._backoff
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
            return False
        self._backoff = _FIRST_BACKOFF
        self._told_away = False
        self._speak_again()
        return True

    def _tell_away(self, why: str, queued: int) -> None:
        """Say so at growing intervals, however often it is tried."""
        now = time.monotonic()
        if now < self._tell_at:
            return
        left = max(0.0, self._deadline - now) if self._deadline is not None else None
        self._emit(RegistryUnavailable(why=why, queued=queued, again=self._told_away, left=left))
        self._told_away = True
        self._tell_at = now + self._silence
        self._silence = min(2 * self._silence, _LONGEST_SILENCE)

    def _speak_again(self) -> None:
        self._tell_at, self._silence = 0.0, _FIRST_SILENCE

    def _drain(self) -> None:
        """Empty the queue and close the run; the supervisor bounds how long this may take."""
        self._deadline = time.monotonic() + self._spec.config.attempt.drain
        self._retry_at = 0.0
        self._speak_again()
        while not self._publish(last=True) and time.monotonic() < self._deadline:
            time.sleep(_POLL_SECONDS)

    def _give_up(self, why: ConfigError) -> None:
        self._publisher = None
        self._emit(Warned(message=f"{NOT_REGISTERED}: {why}. {CATCH_UP}"))

    def _status(self) -> RunStatus:
        outcome = self._folder.read_outcome(self._folder.outcome)
        if outcome is None:
            return "failed"
        return _STATUS_OF.get(outcome.code, "failed")


def main() -> int:
    # The supervisor decides when this ends; a signal to the whole group must not lose the queue.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Registrar(AttemptFolder(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
