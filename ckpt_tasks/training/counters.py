"""Counters: where the loops are. Part of every checkpoint."""

from __future__ import annotations

from typing import Any

import msgspec

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.types import Phase, Position

__all__ = ["Counters"]


class Counters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The loops' position and their intentions.

    Parameters
    ----------
    epoch, step, phase
        See `ckpt_tasks.types.Position`.
    batch
        Micro-batches drawn in this epoch.
    in_flight
        A step has begun and its end has not been seen.
    completes_step
        The micro-batch in hand is the last one of its step.
    stopping
        `TrainingRun.stop` was called.
    finished
        The training function has returned: nothing is left, wherever the loops were.
    looped
        Epochs are counted by `TrainingRun.epochs`; otherwise the loops are kept by hand.
    logged
        Metrics that have a value for `step` already.
    """

    epoch: int = 0
    step: int = 0
    phase: Phase = "in_epoch"
    batch: int = 0
    in_flight: bool = False
    completes_step: bool = True
    stopping: bool = False
    finished: bool = False
    looped: bool = False
    logged: list[str] = []

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.step, self.phase)

    @property
    def is_over(self) -> bool:
        """No epoch begins any more, and none goes on."""
        return self.finished or (self.stopping and self.phase == "epoch_done")

    def begin_epoch(self) -> None:
        """Enter the epoch that is due: the next one, unless this one is still under way."""
        self.looped = True
        if self.phase == "epoch_done":
            self.epoch += 1
            self.phase = "in_epoch"
            self.batch = 0

    def next_epoch(self) -> int:
        """The epoch that `begin_epoch` would enter."""
        return self.epoch + (self.phase == "epoch_done")

    def end_epoch(self) -> None:
        """Leave the epoch; a step in flight counts as done."""
        if self.in_flight:
            self.end_step()
        self.phase = "epoch_done"

    def end_step(self) -> None:
        self.step += 1
        self.in_flight = False

    def to_dict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Counters:
        """Inverse of `to_dict`; raises `CorruptCheckpointError` for anything else."""
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise CorruptCheckpointError(f"the checkpoint's counters are wrong: {error}") from error
