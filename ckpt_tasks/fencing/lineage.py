"""Lineage: which checkpoints belong to the run as it stands now.

From the newest attempt that has resumed, follow back what each one started from. A checkpoint
of an attempt beyond what a later attempt resumed from is a zombie's: that work was done again
(or is being done again), and going on from it would fork the run. Timestamps decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.format.records import LINEAGE_ENTRIES, CommitRecord, LineageEntry
from ckpt_tasks.types import CheckpointId

__all__ = ["Lineage", "extend_lineage", "trace_lineage"]


class Lineage(msgspec.Struct, frozen=True):
    """The chain of attempts, newest first, each with the checkpoint it started from."""

    entries: tuple[LineageEntry, ...] = ()

    def valid(self, checkpoints: Iterable[CheckpointId]) -> list[CheckpointId]:
        """Those of `checkpoints` that lie on this lineage, newest first."""
        limits = self._limits()
        found = [
            checkpoint
            for checkpoint in checkpoints
            if checkpoint.attempt in limits and checkpoint.sequence <= limits[checkpoint.attempt]
        ]
        return sorted(found, key=lambda c: (c.attempt, c.sequence), reverse=True)

    def _limits(self) -> dict[int, float]:
        """The last valid sequence of each attempt on the lineage."""
        limits: dict[int, float] = {}
        limit: float = float("inf")
        for entry in self.entries:
            limits[entry.attempt] = limit
            if entry.resumed_from is not None:
                limit = CheckpointId.parse(entry.resumed_from).sequence
        return limits


def trace_lineage(attempts: Sequence[AttemptView]) -> Lineage:
    """Follow back from the newest attempt that has resumed."""
    resumed = {a.number: a.resumed for a in attempts if a.resumed is not None}
    entries: list[LineageEntry] = []
    current = max(resumed, default=None)
    while current in resumed:
        entries += resumed[current].lineage
        # A record keeps the latest entries only; an earlier attempt's goes on from there.
        start = entries[-1].resumed_from
        current = CheckpointId.parse(start).attempt if start is not None else None
    return Lineage(tuple(entries))


def extend_lineage(attempt: int, start: CommitRecord | None) -> Lineage:
    """The lineage of a new `attempt` that goes on from the checkpoint `start`; ``None`` starts
    a lineage of its own.
    """
    if start is None:
        return Lineage((LineageEntry(attempt=attempt, resumed_from=None),))
    entry = LineageEntry(attempt=attempt, resumed_from=start.id)
    return Lineage((entry, *start.lineage[: LINEAGE_ENTRIES - 1]))
