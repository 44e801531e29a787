"""What ranks tell one another about saves, and keep of it; see `ranks`."""

from __future__ import annotations

import msgspec

from ckpt_tasks.types import SaveDecision, Trigger

__all__ = ["AgreedSave", "Answer", "Closed", "Due", "Letter", "Proposal", "Request", "Verdict"]


class AgreedSave(msgspec.Struct, frozen=True):
    """A save that all ranks make.

    Parameters
    ----------
    number
        From 1, in the order of saves; the same on all ranks.
    fresh
        What ranks share is planned anew: a save has failed since the last one.
    """

    number: int
    trigger: Trigger
    reason: str
    fresh: bool = False

    @property
    def decision(self) -> SaveDecision:
        return SaveDecision(self.trigger, self.reason)


class Request(msgspec.Struct, frozen=True):
    """What a rank tells rank 0: that it wants a save, that the one of number `failed` will lack
    its part, that all should plan `anew`, or, of itself, that it closes.
    """

    rank: int
    trigger: Trigger = "manual"
    reason: str = ""
    step: int | None = None
    failed: int | None = None
    anew: bool = False
    closes: bool = False


class Proposal(msgspec.Struct, frozen=True, tag=True):
    """From rank 0 to all: would a save after this `step` suit?"""

    number: int
    step: int


class Answer(msgspec.Struct, frozen=True):
    """To a proposal.

    Parameters
    ----------
    step
        How far the rank is.
    waits
        It will not pass the proposed step.
    ended
        It has no more steps to do.
    """

    step: int
    waits: bool
    ended: bool = False


class Verdict(msgspec.Struct, frozen=True, tag=True):
    """From rank 0 to all: the save at the proposed step or the meeting, or that there is none."""

    save: AgreedSave | None


class Closed(msgspec.Struct, frozen=True, tag=True):
    """From a rank to itself: nobody reads on."""


Letter = Proposal | Verdict | Closed
"""What a rank finds in its inbox."""


class Due(msgspec.Struct, frozen=True):
    """A save that a rank is to make after `step`."""

    step: int
    save: AgreedSave
