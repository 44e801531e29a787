"""Plain records that every layer shares. No logic beyond their own consistency."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

__all__ = [
    "CHECKPOINT_ID",
    "EXIT_BUSY",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_NOT_FOUND",
    "EXIT_STALE",
    "EXIT_STOPPED",
    "EXIT_USAGE",
    "CheckpointId",
    "MetricRow",
    "Number",
    "Phase",
    "Position",
    "SaveDecision",
    "Scalar",
    "Trigger",
    "finite_or_text",
]

Scalar = str | int | float | bool | None
"""What a hyperparameter is once flattened."""

Number = float | Literal["nan", "inf", "-inf"]
"""A metric's value as records keep it: JSON has no non-finite numbers."""

Phase = Literal["in_epoch", "epoch_done"]

Trigger = Literal["epoch", "steps", "duration", "best", "adaptive", "signal", "final", "manual"]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STALE = 3
EXIT_NOT_FOUND = 4
EXIT_BUSY = 5
EXIT_STOPPED = 75
"""Saved and stopped on a signal: run again (EX_TEMPFAIL of sysexits.h)."""

CHECKPOINT_ID = re.compile(r"step-([0-9]{8,15})-a([1-9][0-9]{0,8})-s([1-9][0-9]{0,8})", re.ASCII)


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where in the training loop a checkpoint lies.

    Parameters
    ----------
    epoch
        Index of the epoch, from 0. With ``epoch_done`` it is the epoch that has just ended.
    step
        Steps done since the start of the run; the number of the last step, counted from 1.
    phase
        ``in_epoch``: between two steps of `epoch`, or behind its last step with the code that
        follows the inner loop still to run. ``epoch_done``: that code has run too.
    """

    epoch: int = 0
    step: int = 0
    phase: Phase = "in_epoch"

    def __str__(self) -> str:
        place = "end of" if self.phase == "epoch_done" else "in"
        return f"step {self.step} ({place} epoch {self.epoch})"


class CheckpointId(msgspec.Struct, frozen=True, order=True):
    """``step-00001200-a2-s7``: global step, attempt, sequence in the attempt."""

    step: int
    attempt: int
    sequence: int

    def __str__(self) -> str:
        return f"step-{self.step:08d}-a{self.attempt}-s{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> CheckpointId:
        """Read an id; raises ``ValueError`` when `text` is not exactly one."""
        match = CHECKPOINT_ID.fullmatch(text)
        parsed = cls(*(int(part) for part in match.groups())) if match else None
        if parsed is None or str(parsed) != text:  # one id has one spelling
            raise ValueError(
                f"{text!r} is not a checkpoint id; one looks like 'step-00001200-a2-s7'"
            )
        return parsed


class SaveDecision(msgspec.Struct, frozen=True):
    """Why a save is due."""

    trigger: Trigger
    reason: str


class MetricRow(msgspec.Struct, frozen=True):
    """One value of one metric.

    Parameters
    ----------
    key
        The metric's name.
    value
        Its value; NaN and infinities are allowed.
    step
        The global step it belongs to.
    time_ms
        When it was logged, in milliseconds since the epoch; frozen, so that a row sent twice
        is the same row.
    """

    key: str
    value: float
    step: int
    time_ms: int


def finite_or_text(value: float) -> Number:
    """A float as a record keeps it; ``float()`` turns it back."""
    if math.isfinite(value):
        return float(value)
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
