"""What the steps that a resumed attempt did again have shown: was the training deterministic?"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from ckpt_tasks.types import Number

__all__ = ["MAX_KEYS", "Divergence", "Replay", "is_identical"]

MAX_KEYS = 20
"""Metrics that a `Replay` names: it is part of small records."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Key = Annotated[str, msgspec.Meta(max_length=4096)]


def is_identical(first: float, replayed: float) -> bool:
    """Whether a value came out as it did the first time.

    Every bit counts, with two exceptions, for neither survives the way through a registry: any
    NaN equals any other, and zero equals negative zero.
    """
    return first == replayed or (math.isnan(first) and math.isnan(replayed))


class Divergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value that came out differently: `first`, and then `replayed`."""

    key: _Key
    step: _Count
    first: Number
    replayed: Number

    @property
    def absolute(self) -> float:
        """How far the values lie apart; infinite where one of them is not finite."""
        difference = abs(float(self.replayed) - float(self.first))
        return math.inf if math.isnan(difference) else difference

    @property
    def relative(self) -> float:
        """`absolute` as a part of the larger value: 0 to 2, or infinite as that is."""
        larger = max(abs(float(self.first)), abs(float(self.replayed)))
        return self.absolute / larger if math.isfinite(self.absolute) else math.inf


class Replay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps of one attempt that an earlier one had done, compared by the metrics of both.

    Parameters
    ----------
    steps, values
        What had a first value to compare with.
    diverged_steps, diverged_values
        Those of them that came out differently.
    first
        The first value that did.
    largest, largest_relative
        Those that did by the largest absolute and relative difference; the earlier of equal ones.
    keys
        How many values of each metric did, of the `MAX_KEYS` metrics with the most.
    """

    steps: _Count = 0
    values: _Count = 0
    diverged_steps: _Count = 0
    diverged_values: _Count = 0
    first: Divergence | None = None
    largest: Divergence | None = None
    largest_relative: Divergence | None = None
    keys: dict[_Key, _Count] = {}

    @property
    def has_diverged(self) -> bool:
        return self.diverged_values > 0

    def __str__(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''}"
        if self.first is None or self.largest is None or self.largest_relative is None:
            return f"replayed {steps}, all identical"
        one, other = self.largest, self.largest_relative
        return (
            f"replayed {steps}, {self.diverged_steps} came out differently, first step "
            f"{self.first.step} ({_told(self.first)}); largest difference {one.absolute:.3g} "
            f"({one.key}, step {one.step}), relative {other.relative:.3g} ({other.key}, step "
            f"{other.step})"
        )


def _told(divergence: Divergence) -> str:
    first, replayed = float(divergence.first), float(divergence.replayed)
    return f"{divergence.key}: {first!r}, then {replayed!r}"
