"""Saves of many ranks: all at one place, each its part, and one record for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.errors import StoreError, TornStateError
from ckpt_tasks.schedule.policy import Boundary
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.state.sharing import RankState, SharingPlanner
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.letters import AgreedSave
from ckpt_tasks.training.ranks.policy import AgreedPolicy, agreed_policy
from ckpt_tasks.training.saver import Saver
from ckpt_tasks.types import CheckpointId, Position, SaveDecision

__all__ = ["RankedSaver", "Ranks"]

T = TypeVar("T")

_PLAN_SECONDS = 20.0
"""Ranks come to an agreed step within so many seconds; whoever waits longer plans alone."""

_END_SECONDS = 7 * 24 * 3600.0
"""Rank 0 may have things to do behind its loops. Should it die, the supervisor ends all."""


class Ranks:
    """What one rank's saves need of the others.

    Parameters
    ----------
    agreement
        With the other ranks.
    schedule
        When to save, as configured.
    """

    def __init__(self, agreement: RankAgreement, schedule: ScheduleConfig) -> None:
        self.agreement = agreement
        self.is_busy = False
        """On rank 0: a save is in flight."""
        self.policy: AgreedPolicy = agreed_policy(schedule, agreement, is_busy=lambda: self.is_busy)
        self.save: AgreedSave | None = None
        """The one that is due."""
        self._planner = SharingPlanner(agreement.rank, agreement.world_size, self._exchange)

    def divide(self, captured: CapturedState) -> RankState:
        """Of the state, what this rank writes; see `state.sharing`."""
        if self.save is not None and self.save.fresh:
            self._planner.forget()
        return self._planner.divide(captured)

    def _exchange(self, message: bytes) -> list[bytes] | None:
        """Of the save that is due, or, at the first boundary, of none.

        A rank whose state alone has changed gets no answer, and has all plan at a later save.
        """
        number = self.save.number if self.save is not None else 0
        messages = self.agreement.tell_all(f"plan/{number}", message, seconds=_PLAN_SECONDS)
        if messages is None:
            self.agreement.plan_anew()
        return messages


class RankedSaver(Saver):
    """A `Saver` of one rank: what it begins, all ranks begin.

    A signal that reaches one rank ends training on all, at the step that is agreed. A save that
    fails is tried again where all agree to it. Saves that must succeed, and the last one if it has
    failed, are repeated by all until rank 0 has committed one.
    """

    def __init__(self, *args: Any, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._agreement = ranks.agreement
        self._tells_commits = ranks.agreement.rank == 0
        self._repeats = self._ends = 0

    def _decide(
        self, boundary: Boundary, position: Position, *, signalled: bool
    ) -> SaveDecision | None:
        manual, self._manual = self._manual, None
        if manual is not None:
            self._agreement.ask(SaveDecision("manual", manual))
        failing = self._failing
        if failing is not None and self._agreement.rank == 0 and self._clock() >= failing.retry_at:
            # Asked for once: it comes when all can make it. Its failure would set the next time.
            self._failing = msgspec.structs.replace(failing, retry_at=math.inf)
            self._agreement.ask(failing.decision)
        self._ranks.is_busy = self._in_flight is not None
        decision = self._schedule.should_save(self._context(boundary, position, signalled))
        self._ranks.save = self._ranks.policy.save
        return decision

    def _stop_reason(self, signal: str | None, decision: SaveDecision | None) -> str | None:
        if decision is None or decision.trigger != "signal":
            return None
        return signal or "another rank was asked to stop"

    def _number(self) -> int | None:
        return self._ranks.save.number if self._ranks.save is not None else None

    def _is_whole(self) -> bool:
        # Behind a save that failed: what it referred to may be the reason, and only rank 0 knows.
        return self._ranks.save is not None and self._ranks.save.fresh

    def _waits_for_flight(self, decision: SaveDecision) -> bool:
        return True  # all ranks save here, or none does

    def agreed(self, has_saved: bool) -> bool:
        """Rank 0's word: this one has its part, and does not know whether that was committed."""
        self._ends += 1
        topic, word = f"end/{self._ends}", b"saved" if has_saved else b""

        def ask() -> bool:
            return bool(self._agreement.from_rank_0(topic, word, seconds=_END_SECONDS))

        return self._last_word(ask, otherwise=True)

    def _still_wanted(self, decision: SaveDecision, position: Position) -> SaveDecision | None:
        return self._repetition(super()._still_wanted(decision, position))

    def _still_failing(self) -> SaveDecision | None:
        wanted = super()._still_failing()
        return self._last_word(lambda: self._repetition(wanted), otherwise=None)

    def _last_word(self, ask: Callable[[], T], *, otherwise: T) -> T:
        """What rank 0 says at the end. Where nobody answers any more, it has ended, and wanted
        nothing more; or it has died, of which the supervisor takes care.
        """
        try:
            return ask()
        except StoreError:
            if self._agreement.rank == 0:
                raise
            return otherwise

    def _repetition(self, wanted: SaveDecision | None) -> SaveDecision | None:
        """Rank 0 knows whether the commit stands; if not, all save once more."""
        self._repeats += 1
        self._ranks.save = self._agreement.meet(f"repetition {self._repeats}", wanted)
        return None if self._ranks.save is None else self._ranks.save.decision

    def _failed(self, checkpoint: str, error: StoreError) -> None:
        if self._agreement.rank == 0:
            self._agreement.plan_anew()
        else:
            self._tell_failure(checkpoint, error)
        super()._failed(checkpoint, error)

    def _torn(self, checkpoint: str, error: TornStateError) -> None:
        if self._agreement.rank == 0:
            self._agreement.plan_anew()  # the others have written parts that nothing will name
        else:
            self._tell_failure(checkpoint, error)
        super()._torn(checkpoint, error)

    def _tell_failure(self, checkpoint: str, error: Exception) -> None:
        """Of the save that failed, which may have begun many steps before the one now due."""
        self._agreement.tell_failure(CheckpointId.parse(checkpoint).sequence, str(error))
