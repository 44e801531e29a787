"""What happens at a boundary: metrics get their step, a save is made if one is due."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.errors import CkptTasksError, StoreError
from ckpt_tasks.events import (
    CheckpointCommitted,
    EventSink,
    MetricsLogged,
    Progress,
    SaveFailed,
    SaveStarted,
    Warned,
)
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.schedule.policy import Boundary, SaveContext, SaveDecisionPolicy
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.metrics import JOURNAL_ROWS, MetricBuffer
from ckpt_tasks.types import Position, SaveDecision

__all__ = ["Saver", "TrainingStopped"]

_SEND_SECONDS = 0.1  # between two messages about metrics and progress
_RETRIES = 20  # of failing saves, spread over the time for which they may fail
_MUST_SUCCEED = ("signal", "final")  # no later save makes up for them
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # seconds between their tries
_UNDELAYED = ("manual", *_MUST_SUCCEED)


class TrainingStopped(BaseException):
    """Unwinds the training function after the save that a signal asked for.

    A ``BaseException``, so that the user's ``except Exception`` does not swallow it; ``finally``
    blocks run.
    """


class Saver:
    """Saves at boundaries, and reports.

    Parameters
    ----------
    capture
        Gives the whole state as it is now.
    exact
        Whether that state holds every random number that training depends on.
    max_unprotected
        Seconds during which saves may fail before training does.
    grace
        Seconds that may pass between a request to stop and the end.
    start
        The record of the checkpoint that this attempt started from.
    """

    def __init__(
        self,
        run: str,
        *,
        checkpointer: Checkpointer,
        schedule: SaveDecisionPolicy,
        capture: Callable[[], CapturedState],
        exact: Callable[[], bool],
        on_event: EventSink,
        start: CommitRecord | None = None,
        max_unprotected: float,
        grace: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run = run
        self._checkpointer = checkpointer
        self._schedule = schedule
        self._capture = capture
        self._exact = exact
        self._on_event = on_event
        self._max_unprotected = max_unprotected
        self._grace = grace
        self._clock = clock
        self._sleep = sleep
        self._metrics = MetricBuffer()
        self._manual: str | None = None
        self._signal: str | None = None
        self._stop_by: float | None = None
        self._ended: CkptTasksError | TrainingStopped | None = None
        self._failing: _Failing | None = None
        self._captured_once = False
        self._warned: set[str] = set()
        self._saved_at = self._sent_at = clock()
        self.epochs_total: int | None = None
        self.saved: Position | None = None
        """Position of the newest checkpoint."""
        self.checkpoint: str | None = None
        """Its id."""
        if start is not None:
            self.saved, self.checkpoint = start.position, start.id

    @property
    def metrics(self) -> MetricBuffer:
        return self._metrics

    def request_save(self, reason: str) -> None:
        """Save at the next boundary."""
        self._manual = reason

    def request_stop(self, reason: str) -> None:
        """Save at the next boundary and unwind; from any thread, or a signal's handler."""
        if self._stop_by is None:
            self._stop_by = self._clock() + self._grace
        self._signal = self._signal or reason

    def restart_clock(self) -> None:
        """Training begins now: time spent before it is not time unprotected."""
        self._saved_at = self._sent_at = self._clock()

    def at_boundary(self, boundary: Boundary, counters: Counters, *, moved: bool = False) -> None:
        """Close the step's metrics, save if due, report; unwind if asked to stop.

        What it raises ends training: it is raised again at each later boundary, should the
        user's code go on.

        Parameters
        ----------
        moved
            The state may have changed since the last save although the position has not.

        Raises
        ------
        TrainingStopped
            A stop was requested; the state is saved.
        StateError
            State made since the last boundary cannot be represented.
        StaleAttemptError
            A later attempt owns the run.
        StoreError
            Saves have failed for too long; the last one that matters is tried until then.
        """
        if self._ended is not None:
            raise self._ended
        signal = self._signal  # read once: one that comes during the save waits for the next
        try:
            self._close_step(counters)
            decision = self._decide(boundary, counters.position, signalled=signal is not None)
            if decision is not None and (moved or self.saved != counters.position):
                self._save(decision, counters)
            elif not self._captured_once:
                # State made lazily, by the first step, must be representable too: better known
                # now than at the first save, hours later.
                self._checkpointer.prepare(self._capture())
            self._captured_once = True
            if signal is not None:
                self.flush(counters.position)
                raise TrainingStopped(signal)
        except (CkptTasksError, TrainingStopped) as error:
            self._ended = error
            raise
        if self._clock() - self._sent_at >= _SEND_SECONDS:
            self.flush(counters.position)

    def finish(self, counters: Counters, *, save: bool) -> None:
        """Training has returned: the same for its end, where a stop asks for nothing any more."""
        if self._ended is not None:
            raise self._ended
        self._signal = None
        if save:
            self.at_boundary("end", counters, moved=True)
        else:
            self._close_step(counters)
        self.flush(counters.position)

    def flush(self, position: Position) -> None:
        """Send what has been logged up to the last boundary, and how far training is."""
        rows = self._metrics.drain()
        if rows:
            self._on_event(MetricsLogged(rows=rows))
        if self._metrics.has_overflowed:
            self.warn_once(
                f"more than {JOURNAL_ROWS} metric values were logged between two checkpoints, "
                "which keep the newest of them only: those before are lost, unless the registry "
                "takes them while this attempt runs; save more often, or log less often"
            )
        self._on_event(Progress(position=position, epochs=self.epochs_total))
        self._sent_at = self._clock()

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._on_event(Warned(message=message))

    def _close_step(self, counters: Counters) -> None:
        dropped = self._metrics.close_step(counters.step)
        if dropped:
            self.warn_once(
                f"metrics {dropped} were logged twice for one step; the first value was kept"
            )

    def _decide(
        self, boundary: Boundary, position: Position, *, signalled: bool
    ) -> SaveDecision | None:
        now = self._clock()
        decision = self._schedule.should_save(
            SaveContext(
                boundary=boundary,
                position=position,
                saved_step=self.saved.step if self.saved else 0,
                seconds_since_save=now - self._saved_at,
                signalled=signalled,
            )
        )
        manual, self._manual = self._manual, None
        if manual is not None and (decision is None or decision.trigger not in _MUST_SUCCEED):
            decision = SaveDecision("manual", manual)
        if self._failing is not None:
            decision = decision or self._failing.decision
            if now < self._failing.retry_at and decision.trigger not in _UNDELAYED:
                return None
        return decision

    def _save(self, decision: SaveDecision, counters: Counters) -> None:
        position = counters.position
        counters.logged = self._metrics.logged
        started = self._clock()
        self.flush(position)
        state = self._capture()
        request = SaveRequest(
            position=position,
            decision=decision,
            metrics=dict(self._metrics.of_step),
            rows=self._metrics.journal(),
            nonfinite=state.nonfinite,
            exact=self._exact(),
            capture_seconds=self._clock() - started,
        )
        record = self._try(state, request)
        pause = _FIRST_PAUSE
        while record is None and decision.trigger in _MUST_SUCCEED:
            self._sleep(min(pause, max(0.0, self._give_up_at() - self._clock())))
            pause = min(2 * pause, _LONGEST_PAUSE)
            record = self._try(state, request)
        if record is not None:
            self._saved(record, request, started)

    def _try(self, state: CapturedState, request: SaveRequest) -> CommitRecord | None:
        """Save once; ``None`` after a failure that need not end training yet."""
        checkpoint = str(self._checkpointer.next_id(request.position))
        decision = request.decision
        self._on_event(
            SaveStarted(checkpoint=checkpoint, trigger=decision.trigger, reason=decision.reason)
        )
        try:
            return self._checkpointer.save(state, request)
        except StoreError as error:
            self._failed(checkpoint, decision, error)
            return None

    def _saved(self, record: CommitRecord, request: SaveRequest, started: float) -> None:
        self._metrics.forget_journal()
        self._failing = None
        self._saved_at = self._clock()
        self.saved, self.checkpoint = request.position, record.id
        self._on_event(
            CheckpointCommitted(
                checkpoint=record.id,
                position=request.position,
                trigger=request.decision.trigger,
                reason=request.decision.reason,
                size=record.size,
                seconds=self._saved_at - started,
            )
        )

    def _failed(self, checkpoint: str, decision: SaveDecision, error: StoreError) -> None:
        """A failed save is an event, and tried again, until saves have failed for too long."""
        now = self._clock()
        since = self._failing.since if self._failing else now
        pause = self._max_unprotected / _RETRIES
        self._failing = _Failing(decision, since=since, retry_at=now + pause)
        unprotected = now - self._saved_at
        self._on_event(SaveFailed(checkpoint=checkpoint, why=str(error), unprotected=unprotected))
        if now >= self._give_up_at():
            raise StoreError(
                f"{checkpoint} of run {self._run!r} could not be saved, and there has been no "
                f"new checkpoint for {unprotected:.0f} s: {error}"
            ) from error

    def _give_up_at(self) -> float:
        """When training ends, by the clock, should saves go on failing."""
        since = self._failing.since if self._failing else self._clock()
        limit = since + self._max_unprotected
        return limit if self._stop_by is None else min(limit, self._stop_by)


class _Failing(msgspec.Struct, frozen=True):
    """Saves fail: the latest `decision`, the first failure, when to try again (by the clock)."""

    decision: SaveDecision
    since: float
    retry_at: float
