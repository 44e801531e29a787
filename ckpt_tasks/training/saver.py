"""What happens at a boundary: metrics get their step, a save is begun if one is due.

Training waits while the state is staged, and goes on while it is written. One save is in flight at
a time; how it ended is seen at a later boundary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.job import committed_event
from ckpt_tasks.checkpointer.staged import StagedState
from ckpt_tasks.errors import CkptTasksError, StoreError, TornStateError
from ckpt_tasks.events import EventSink, SaveAwaited, SaveDelayed, SavesRecovered, SaveStarted
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.schedule.policy import Boundary, SaveContext, SaveDecisionPolicy
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.failing import Failing
from ckpt_tasks.training.reporter import Reporter
from ckpt_tasks.types import Position, SaveDecision

__all__ = ["Saver", "TrainingStopped"]

_RETRIES = 20  # of failing saves, spread over the time for which they may fail
_MUST_SUCCEED = ("signal", "final")  # no later save makes up for them
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # seconds between their tries
_UNDELAYED = ("manual", *_MUST_SUCCEED)
_OF_THIS_BOUNDARY = ("epoch", "best", *_UNDELAYED)
"""Saves of what is now, which wait for the one in flight; the others are as good a little later."""

_LOOK_SECONDS = 0.25  # between two looks at requests to stop while training waits for a save
_FIRST_WORD, _LONGEST_SILENCE = 10.0, 60.0  # seconds of waiting between two words about it


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
    stop_on_error
        Training fails with the first save that does, if that need not be tried again.
    makes_room
        What has expired is removed once a save finds no room; then that is tried once more.
    """

    def __init__(
        self,
        run: str,
        *,
        checkpointer: Checkpointer,
        schedule: SaveDecisionPolicy,
        capture: Callable[[], StagedState],
        exact: Callable[[], bool],
        on_event: EventSink,
        reporter: Reporter,
        start: CommitRecord | None = None,
        max_unprotected: float,
        grace: float,
        stop_on_error: bool = False,
        makes_room: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run = run
        self._checkpointer = checkpointer
        self._schedule = schedule
        self._capture = capture
        self._exact = exact
        self._on_event = on_event
        self._reporter = reporter
        self._max_unprotected = max_unprotected
        self._grace = grace
        self._stop_on_error = stop_on_error
        self._makes_room = makes_room
        self._clock = clock
        self._sleep = sleep
        self._manual: str | None = None
        self._signal: str | None = None
        self._stop_by: float | None = None
        self._ended: CkptTasksError | TrainingStopped | None = None
        self._failing: Failing | None = None
        self._in_flight: _Flight | None = None
        self._save_seconds = 0.0
        self._captured_once = False
        self._saved_at = clock()
        self._tells_commits = True
        self.may_overlap = True
        """No state has changed yet while it was copied."""
        self.saved: Position | None = None
        """Position of the newest checkpoint."""
        self.checkpoint: str | None = None
        """Its id."""
        if start is not None:
            self.saved, self.checkpoint = start.position, start.id

    @property
    def newest(self) -> Position | None:
        """Position of the save in flight, else of the newest checkpoint."""
        return self._in_flight.position if self._in_flight is not None else self.saved

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
        self._saved_at = self._clock()
        self._reporter.restart_clock()

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
            self._reporter.close_step(counters.step)
            self._look()
            decision = self._decide(boundary, counters.position, signalled=signal is not None)
            if decision is not None and (moved or self.newest != counters.position):
                self._save(decision, counters)
            elif not self._captured_once:
                # State made lazily, by the first step, must be representable too: better known
                # now than at the first save, hours later.
                self._checkpointer.prepare(self._capture())
            self._captured_once = True
            stop = self._stop_reason(signal, decision)
            if stop is not None:
                self.settle()
                self._reporter.flush(counters.position)
                raise TrainingStopped(stop)
        except (CkptTasksError, TrainingStopped) as error:
            self._ended = error
            raise
        self._reporter.flush_if_due(counters.position)

    def finish(self, counters: Counters, *, save: bool) -> None:
        """Training has returned: the same for its end, where a stop asks for nothing any more."""
        if self._ended is not None:
            raise self._ended
        self._signal = None
        if save:
            self.at_boundary("end", counters, moved=True)
        else:
            self._reporter.close_step(counters.step)
        self._make_up(counters)
        self._reporter.flush(counters.position)

    def settle(self) -> None:
        """Wait for the save in flight, if there is one.

        A failure is told, as ever; raises `StoreError` once saves have failed for too long, and
        `StaleAttemptError` and `ConfigError` at once.
        """
        began, silence = self._clock(), _FIRST_WORD
        while self._in_flight is not None:
            self._look(_LOOK_SECONDS)
            waited = self._clock() - began
            if self._in_flight is not None and waited >= silence:
                self._tell_waiting(waited)
                silence = waited + min(waited, _LONGEST_SILENCE)

    def close(self) -> None:
        """No more saves will come."""
        self._checkpointer.close()

    def _stop_reason(self, signal: str | None, decision: SaveDecision | None) -> str | None:
        """Why training ends at this boundary, the state being saved."""
        return signal

    def agreed(self, has_saved: bool) -> bool:
        """Whether the end is saved already: what all ranks go by, where there are several."""
        return has_saved

    def _number(self) -> int | None:
        """Of the save that is due, where it is not the next one."""
        return None

    def _is_whole(self) -> bool:
        """Whether the save that is due must refer to no earlier one."""
        return False

    def _waits_for_flight(self, decision: SaveDecision) -> bool:
        """Whether this save waits for the one in flight, or is as good a little later."""
        return decision.trigger in _OF_THIS_BOUNDARY

    def _decide(
        self, boundary: Boundary, position: Position, *, signalled: bool
    ) -> SaveDecision | None:
        now = self._clock()
        decision = self._schedule.should_save(self._context(boundary, position, signalled))
        manual, self._manual = self._manual, None
        if manual is not None and (decision is None or decision.trigger not in _MUST_SUCCEED):
            decision = SaveDecision("manual", manual)
        if self._failing is not None:
            decision = decision or self._failing.decision
            if now < self._failing.retry_at and decision.trigger not in _UNDELAYED:
                return None
        return decision

    def _context(self, boundary: Boundary, position: Position, signalled: bool) -> SaveContext:
        since = self._in_flight.staged_at if self._in_flight is not None else self._saved_at
        return SaveContext(
            boundary=boundary,
            position=position,
            saved_step=self.newest.step if self.newest else 0,
            seconds_since_save=self._clock() - since,
            signalled=signalled,
        )

    def _save(self, decision: SaveDecision, counters: Counters) -> None:
        if self._in_flight is not None:
            waits = self._waits_for_flight(decision)
            self._tell_delay(decision, counters.position, self._in_flight, waits=waits)
            if not waits:
                return
            self.settle()
        must_succeed = decision.trigger in _MUST_SUCCEED
        if must_succeed:
            self._tell_haste()
        self._begin(decision, counters)
        if must_succeed:
            self._repeat(lambda: self._still_wanted(decision, counters.position), counters)

    def _make_up(self, counters: Counters) -> None:
        """What was due and has failed is saved now: no boundary comes any more."""
        self._repeat(self._still_failing, counters)

    def _repeat(self, wanted: Callable[[], SaveDecision | None], counters: Counters) -> None:
        """Save again and again, after growing pauses, until nothing is `wanted`."""
        pause = _FIRST_PAUSE
        while (decision := wanted()) is not None:
            self._sleep(min(pause, max(0.0, self._give_up_at() - self._clock())))
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._begin(decision, counters)

    def _still_wanted(self, decision: SaveDecision, position: Position) -> SaveDecision | None:
        """Whether the save in flight, once it has ended, has not saved `position`."""
        self.settle()
        return None if self.saved == position and self._failing is None else decision

    def _still_failing(self) -> SaveDecision | None:
        """What was due, if the latest save, once it has ended, has failed."""
        self.settle()
        return None if self._failing is None else self._failing.decision

    def _begin(self, decision: SaveDecision, counters: Counters) -> None:
        """Capture and hand over; an inline save has ended with it."""
        position = counters.position
        number = self._number()
        checkpoint = str(self._checkpointer.next_id(position, number))
        counters.logged = self._reporter.metrics.logged
        started = self._clock()
        self._reporter.flush(position)
        state = self._capture()
        request = SaveRequest(
            position=position,
            decision=decision,
            metrics=dict(self._reporter.metrics.of_step),
            rows=self._reporter.metrics.journal(),
            exact=self._exact(),
            capture_seconds=self._clock() - started,
            number=number,
            whole=self._is_whole(),
        )
        self._on_event(
            SaveStarted(checkpoint=checkpoint, trigger=decision.trigger, reason=decision.reason)
        )
        self._in_flight = _Flight(decision, position, started)
        try:
            self._checkpointer.begin(state, request)
        except StoreError as error:
            self._failed(checkpoint, error)
            return
        self._look()

    def _look(self, timeout: float = 0.0) -> None:
        """See whether the save in flight has ended, for `timeout` seconds at most."""
        flight = self._in_flight
        if flight is None:
            return
        checkpoint = str(self._checkpointer.in_flight)
        try:
            record = self._checkpointer.poll(timeout)
        except StoreError as error:
            self._failed(checkpoint, error)
            return
        except TornStateError as error:
            self._torn(checkpoint, error)
            return
        except CkptTasksError:
            self._in_flight = None
            raise
        if record is not None:
            self._saved(record, flight)
        else:
            self._bound_wait(checkpoint, flight)

    def _bound_wait(self, checkpoint: str, flight: _Flight) -> None:
        """A save that does not end is one that failed; at the end of the grace it goes on alone."""
        now = self._clock()
        if now - flight.staged_at >= self._max_unprotected:
            self._checkpointer.give_up()
            waited = now - flight.staged_at
            self._failed(checkpoint, StoreError(f"it was not written within {waited:.0f} s"))
        elif self._stop_by is not None and now >= self._stop_by:
            raise StoreError(
                f"{checkpoint} of run {self._run!r} is still being written {self._grace:g} s after "
                "the request to stop; it may yet become a checkpoint"
            )

    def _saved(self, record: CommitRecord, flight: _Flight) -> None:
        self._reporter.metrics.forget_journal()
        if self._failing is not None:
            unprotected = self._clock() - self._saved_at
            count = self._failing.count
            self._on_event(
                SavesRecovered(checkpoint=record.id, failures=count, unprotected=unprotected)
            )
        self._in_flight = self._failing = None
        self._saved_at = flight.staged_at
        self._save_seconds = sum(record.timings.values())
        self.saved, self.checkpoint = flight.position, record.id
        if not self._checkpointer.tells_commits and self._tells_commits:
            self._on_event(committed_event(record, self._clock() - flight.staged_at))

    def _failed(self, checkpoint: str, error: StoreError) -> None:
        """A failed save is an event, and tried again, until saves have failed for too long."""
        failing = self._note_failure(checkpoint, error, self._max_unprotected / _RETRIES)
        if self._stops_at(failing):
            raise StoreError(
                f"{checkpoint} of run {self._run!r} could not be saved, at which save.on_error = "
                f"'stop' ends the attempt: {error}"
            ) from error
        now = self._clock()
        if now >= self._give_up_at():
            raise StoreError(
                f"{checkpoint} of run {self._run!r} could not be saved, and there has been no "
                f"new checkpoint for {now - self._saved_at:.0f} s: {error}"
            ) from error

    def _torn(self, checkpoint: str, error: TornStateError) -> None:
        """Save again at the next boundary, and copy everything there from now on."""
        self.may_overlap = False
        self._note_failure(checkpoint, error, 0.0)

    def _note_failure(
        self, checkpoint: str, error: StoreError | TornStateError, pause: float
    ) -> Failing:
        """Tell of it; the next try comes after `pause` seconds."""
        flight, self._in_flight = self._in_flight, None
        assert flight is not None
        now = self._clock()
        self._failing = failing = Failing.following(
            self._failing,
            error,
            flight.decision,
            begun=flight.staged_at,
            now=now,
            pause=pause,
            makes_room=self._makes_room,
        )
        self._on_event(failing.told(self._run, checkpoint, error, now - self._saved_at))
        return failing

    def _stops_at(self, failing: Failing) -> bool:
        if not self._stop_on_error or failing.decision.trigger in _MUST_SUCCEED:
            return False
        return not (self._makes_room and failing.may_find_room)

    def _give_up_at(self) -> float:
        """When training ends, by the clock, should saves go on failing, or one not end."""
        if self._failing is not None:
            since = self._failing.since
        else:
            since = self._in_flight.staged_at if self._in_flight is not None else self._clock()
        limit = since + self._max_unprotected
        return limit if self._stop_by is None else min(limit, self._stop_by)

    def _tell_waiting(self, waited: float) -> None:
        """Training stands still until a save has ended: for how long, and how long at most."""
        self._on_event(
            SaveAwaited(
                checkpoint=str(self._checkpointer.in_flight),
                waited=waited,
                left=max(0.0, self._give_up_at() - self._clock()),
            )
        )

    def _tell_delay(
        self, decision: SaveDecision, position: Position, flight: _Flight, *, waits: bool
    ) -> None:
        if flight.delays and not waits:
            return
        flight.delays += 1
        self._on_event(
            SaveDelayed(
                trigger=decision.trigger,
                reason=decision.reason,
                position=position,
                behind=str(self._checkpointer.in_flight),
                waits=waits,
            )
        )

    def _tell_haste(self) -> None:
        """Say so where the time that is left for the save is less than the last one took."""
        left = self._stop_by - self._clock() if self._stop_by is not None else math.inf
        if left < self._save_seconds:
            self._reporter.warn_once(
                f"{max(left, 0.0):.0f} s are left to save and stop, and the last save took "
                f"{self._save_seconds:.0f} s: it may come too late, and a longer grace would help"
            )


class _Flight(msgspec.Struct):
    """The save in flight: why, of what, since when (by the clock), and how many saves that were due
    meanwhile have been told of.
    """

    decision: SaveDecision
    position: Position
    staged_at: float
    delays: int = 0
