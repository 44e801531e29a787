"""A save policy for many ranks: what one wants, or rank 0 decides, all do at one place."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import msgspec

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.schedule.policy import SaveContext, SaveDecisionPolicy, policy_from_config
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.letters import AgreedSave
from ckpt_tasks.types import SaveDecision

__all__ = ["AgreedPolicy", "agreed_policy"]

_ASK_AGAIN_SECONDS = 10.0  # a wish that led to nothing, as near the end of a rank's data


def agreed_policy(
    config: ScheduleConfig, agreement: RankAgreement, *, is_busy: Callable[[], bool]
) -> AgreedPolicy:
    """The policy that a configuration describes, agreed among ranks.

    Parameters
    ----------
    is_busy
        On rank 0: a save is under way, so that none but those at an end, and those that a signal
        asks for, is begun.
    """
    rest = policy_from_config(msgspec.structs.replace(config, every_steps=None))
    return AgreedPolicy(rest, agreement, every_steps=config.every_steps, is_busy=is_busy)


class AgreedPolicy:
    """Is asked at every boundary of every rank, and says the same to all of them.

    Parameters
    ----------
    policy
        Its word counts on rank 0. Between steps it can only lead to a save some steps later.
    every_steps
        Saves at multiples of it are agreed ahead, so that they lie there exactly, unless steps
        are shorter than a few messages take; then the next multiple is.
    """

    def __init__(
        self,
        policy: SaveDecisionPolicy,
        agreement: RankAgreement,
        *,
        every_steps: int | None,
        is_busy: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._agreement = agreement
        self._every_steps = every_steps
        self._is_busy = is_busy
        self._clock = clock
        self._signalled = False
        self._multiple = 0  # the one that was asked for last
        self._ask_at = 0.0
        self._met: Counter[str] = Counter()
        self.save: AgreedSave | None = None
        """What the latest decision was: number of the save, and whether to plan anew."""

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        """As `SaveDecisionPolicy`.

        Raises `StoreError` where rank 0 does not come to a place at which all must be.
        """
        if context.signalled and not self._signalled:
            self._signalled = True
            self._agreement.ask(SaveDecision("signal", "asked to stop"))
        if context.boundary == "step":
            self.save = self._between_steps(context)
        else:
            self.save = self._at_meeting(context)
        if self.save is not None:
            self._ask_at = 0.0
        return None if self.save is None else self.save.decision

    def _between_steps(self, context: SaveContext) -> AgreedSave | None:
        if self._agreement.rank == 0 and not self._is_busy():
            self._ask_ahead(context.position.step)
            self._ask_now(context)
        return self._agreement.at_step(context.position.step)

    def _ask_ahead(self, step: int) -> None:
        if self._every_steps is None:
            return
        multiple = (step // self._every_steps + 1) * self._every_steps
        if multiple > self._multiple:
            self._multiple = multiple
            reason = f"every {self._every_steps} steps"
            self._agreement.ask(SaveDecision("steps", reason), step=multiple)

    def _ask_now(self, context: SaveContext) -> None:
        wanted = self._policy.should_save(context)
        if wanted is not None and wanted.trigger != "signal" and self._clock() >= self._ask_at:
            self._ask_at = self._clock() + _ASK_AGAIN_SECONDS
            self._agreement.ask(wanted)

    def _at_meeting(self, context: SaveContext) -> AgreedSave | None:
        wanted = self._policy.should_save(context) if self._agreement.rank == 0 else None
        place = f"{context.boundary} of epoch {context.position.epoch}"
        self._met[place] += 1
        return self._agreement.meet(
            f"{place}, {self._met[place]}", wanted, last=context.boundary == "end"
        )
