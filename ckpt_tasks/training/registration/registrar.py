"""The registrar: heartbeat, metrics and registration, in a process beside the trainer.

``python -m ckpt_tasks.training.registration.registrar FOLDER LIVENESS_FD``. It follows the
trainer's events, so a trainer that is killed costs it nothing: what was reported is still
published. The registry is imported here and nowhere else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque

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
    MetricsReplayed,
    Progress,
    RegistryUnavailable,
    RunFoundComplete,
    SaveFailed,
    SaveStarted,
    Warned,
)
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import Heart
from ckpt_tasks.fencing.process import process_is_alive, this_process
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import AttemptClaim, Failure
from ckpt_tasks.registry import RunDescription, RunStatus, load_registry
from ckpt_tasks.replay import Replay
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.registration.interrupted import abort_interrupted
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.registration.retainer import Retainer
from ckpt_tasks.training.spec import CATCH_UP, NOT_REGISTERED, AttemptFolder
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED, Position, Scalar

__all__ = ["main"]

_POLL_SECONDS = 0.2
_STATUS_OF: dict[int, RunStatus] = {EXIT_DONE: "finished", EXIT_STOPPED: "stopped"}
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 8.0
_MISSED_BEATS = 3  # in a row, that are worth a word
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
        self._commits = EventReader(folder.writer_events)
        self._emit = EventLog(folder.registrar_events)
        self._layout = RunLayout(self._spec.run)
        self._released = threading.Event()
        self._claimed: AttemptClaimed | RunFoundComplete | None = None
        self._store: Store | None = None
        self._heart: Heart | None = None
        self._publisher: Publisher | None = None
        self._registers = self._spec.config.registry.tracking_uri is not None
        self._settled = False  # what the attempt resumed from is recorded, and so the lineage
        self._waiting: deque[MetricsLogged | SaveStarted | CheckpointCommitted] = deque()
        self._step: int | None = None
        self._failure: Failure | None = None
        self._replay = _told_replay(folder)
        self._told_silent = False
        self._retry_at = 0.0
        self._backoff = _FIRST_BACKOFF
        self._told_away = False
        self._tell_at = 0.0
        self._silence = _FIRST_SILENCE
        self._deadline: float | None = None
        self._retainer: Retainer | None = None
        self._aborting: threading.Thread | None = None
        self._has_committed = False  # since retention was applied
        self._needs_room = False  # a save found none since
        threading.Thread(target=self._watch, args=(liveness,), daemon=True).start()

    def run(self) -> int:
        """Returns when there is nothing left to do, or another attempt owns the run."""
        try:
            self._follow()
            self._note_failure()
            self._drain()
            self._finish_retention()
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
            if self._publish() or self._needs_room:
                self._retain()
            self._watch_heart()
            self._pause()
        self._handle_events()

    def _pause(self) -> None:
        if not self._released.is_set():
            self._released.wait(_POLL_SECONDS)
        else:  # the supervisor is gone, and the attempt not over
            time.sleep(_POLL_SECONDS)

    def _is_over(self) -> bool:
        """The supervisor says so; or it is gone itself, and the trainer and the writer are, too."""
        if not self._released.is_set():
            return False
        if self._folder.outcome.exists() or not isinstance(self._claimed, AttemptClaimed):
            return True
        trainer_lives = process_is_alive(this_process(self._claimed.pid))
        return not trainer_lives and not self._folder.has_live_writer()

    def _handle_events(self) -> None:
        # Read before, handled behind the trainer's: the rows that a checkpoint holds come first.
        commits = list(self._commits.read())
        for event in (*self._events.read(), *commits):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        """Take note, and no more: what needs the store or the registry may have to wait."""
        if isinstance(event, AttemptClaimed):
            self._claimed = event
        elif isinstance(event, RunFoundComplete):
            self._claimed = event
            self._settled = True
        elif isinstance(event, AttemptResumed):
            self._note_step(event.position)
            self._settled = True
        elif isinstance(event, Progress):
            self._note_step(event.position)
        elif isinstance(event, SaveFailed):
            self._needs_room |= event.no_space
        elif isinstance(event, MetricsLogged | SaveStarted | CheckpointCommitted):
            self._has_committed |= isinstance(event, CheckpointCommitted)
            if self._registers:
                self._waiting.append(event)

    def _note_step(self, position: Position) -> None:
        self._step = position.step
        if self._heart is not None:
            self._heart.step = position.step

    def _note_failure(self) -> None:
        """Before the drain, which may be cut short: later attempts compare their own end."""
        outcome = self._folder.read_outcome(self._folder.outcome)
        self._failure = outcome.ended_with if outcome is not None else None
        if self._heart is not None:
            self._heart.failure = self._failure

    def _open(self) -> None:
        """Open what is needed by now and is not open yet.

        Raises `StoreError`, after which it can be called again, and `ConfigError` where the
        registry cannot be used as asked.
        """
        if self._claimed is None:
            return
        if self._store is None:
            self._store = self._open_store()
        if self._heart is None and isinstance(self._claimed, AttemptClaimed):
            self._heart = self._start_heart(self._store, self._claimed)
        if self._publisher is None and self._settled and self._registers:
            self._publisher = self._open_publisher(self._store, self._claimed)

    def _retain(self) -> None:
        """What has been committed, and registered, may let older ones go; so may a full disk what
        has expired.
        """
        claimed, config = self._claimed, self._spec.config
        if not (self._has_committed or self._needs_room) or config.retention.keeps_everything:
            return
        if self._store is None or not isinstance(claimed, AttemptClaimed):
            return
        if self._retainer is None:
            store = self._store
            self._retainer = Retainer(
                store,
                self._layout,
                claimed.attempt,
                config,
                lambda: self._describe(claimed, store),
                self._emit,
            )
        self._retainer.wake(needs_room=self._needs_room)
        self._has_committed = self._needs_room = False

    def _finish_retention(self) -> None:
        self._retain()
        if self._retainer is not None:
            self._retainer.finish(within=self._left())
        if self._aborting is not None:
            self._aborting.join(self._left())

    def _left(self) -> float:
        """Seconds until all must be done."""
        return 0.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _open_store(self) -> Store:
        try:
            return open_store(self._spec.config.store)
        except ConfigError as error:
            # The trainer has opened it just so: credentials, say, that ran out may be renewed.
            raise StoreError(str(error)) from error

    def _start_heart(self, store: Store, claimed: AttemptClaimed) -> Heart:
        interval = self._spec.config.attempt.heartbeat
        heart = Heart(store, self._layout, claimed.attempt, interval=interval)
        heart.step, heart.failure, heart.replay = self._step, self._failure, self._replay
        heart.start()
        self._aborting = abort_interrupted(store, self._layout, claimed.attempt, self._emit)
        return heart

    def _watch_heart(self) -> None:
        """Tell once that it cannot beat; once more should it recover and fail again."""
        error = self._heart.last_error if self._heart is not None else None
        if self._heart is not None and error is not None and self._heart.missed >= _MISSED_BEATS:
            self._tell_silent(error)
        elif self._heart is not None and error is None:
            self._told_silent = False

    def _tell_silent(self, error: StoreError) -> None:
        if self._told_silent:
            return
        self._told_silent = True
        after = self._spec.config.attempt.takeover_after
        self._emit(
            Warned(
                message=f"no heartbeat can be written ({error}); training goes on, but after "
                f"{after:g} s of silence another invocation may take the run over"
            )
        )

    def _open_publisher(
        self, store: Store, claimed: AttemptClaimed | RunFoundComplete
    ) -> Publisher:
        config = self._spec.config.registry
        return Publisher(
            store,
            self._layout,
            Fence(store, self._layout, claimed.attempt),
            load_registry(config),
            config,
            self._describe(claimed, store),
            self._tell_published,
            bounds=self._folder.keep_metric_bounds,
        )

    def _tell_published(self, event: Event) -> None:
        """Pass on what is told of publishing; what a replay has shown, once in the attempt."""
        if isinstance(event, MetricsReplayed):
            if self._replay is not None:
                return
            self._replay = event.replay
            if self._heart is not None:
                self._heart.replay = event.replay
        self._emit(event)

    def _describe(self, claimed: AttemptClaimed | RunFoundComplete, store: Store) -> RunDescription:
        return RunDescription(
            run=claimed.run,
            uid=claimed.uid,
            store_url=store.url,
            hyperparameters=self._hyperparameters(claimed.attempt, store),
            entrypoint=self._spec.recorded_entrypoint,
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
        """Publish what waits, unless store and registry are being left alone for a while.

        With `last`, close the run as well. Returns whether nothing is left to do.
        """
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._open()
            if self._publisher is not None:
                self._hand_over(self._publisher)
                if last:
                    self._publisher.settle(self._status())
                self._publisher.publish()
                if last:
                    self._publisher.end(self._status())
        except ConfigError as error:
            self._give_up(error)
        except (RegistryError, StoreError) as error:
            self._tell(error)
            if last:
                self._keep_unsent()
            self._retry_at = time.monotonic() + self._backoff
            self._backoff = min(2 * self._backoff, _LONGEST_BACKOFF)
            return False
        self._backoff = _FIRST_BACKOFF
        self._told_away = False
        self._speak_again()
        return True

    def _keep_unsent(self) -> None:
        """Metrics behind the last checkpoint would be lost, should the registry stay away."""
        try:
            if self._publisher is not None:
                self._publisher.keep_unsent()
        except StoreError as error:
            self._tell(error)  # tried again with the next request

    def _hand_over(self, publisher: Publisher) -> None:
        while self._waiting:
            event = self._waiting.popleft()
            if isinstance(event, MetricsLogged):
                publisher.add_rows(event.rows)
            elif isinstance(event, SaveStarted):
                publisher.add_save(event.checkpoint)
            else:
                publisher.add_commit(event.checkpoint)

    def _tell(self, error: RegistryError | StoreError) -> None:
        alive = isinstance(self._claimed, AttemptClaimed)
        if alive and self._heart is None and isinstance(error, StoreError):
            self._tell_silent(error)
        if self._registers:
            opened = self._publisher
            self._tell_away(str(error), opened.queued if opened else len(self._waiting) + 1)

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
        self._registers = False
        self._waiting.clear()
        self._emit(Warned(message=f"{NOT_REGISTERED}: {why}. {CATCH_UP}"))

    def _status(self) -> RunStatus:
        outcome = self._folder.read_outcome(self._folder.outcome)
        if outcome is None:
            return "failed"
        return _STATUS_OF.get(outcome.code, "failed")


def _told_replay(folder: AttemptFolder) -> Replay | None:
    """What the registrar in whose place this one comes has told."""
    events = EventReader(folder.registrar_events).read()
    told = [event.replay for event in events if isinstance(event, MetricsReplayed)]
    return told[-1] if told else None


def main() -> int:
    # The supervisor decides when this ends; a signal to the whole group must not lose the queue.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Registrar(AttemptFolder(sys.argv[1]), int(sys.argv[2])).run()


if __name__ == "__main__":
    sys.exit(main())
