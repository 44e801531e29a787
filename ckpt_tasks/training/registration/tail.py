"""Metrics behind an attempt's last checkpoint, where a registry is told of committed steps only.

They are kept in the store, beside the attempt. An attempt that goes on from that checkpoint does
their steps again, and compares; of a run that never goes on, `reconcile` sends them, so that they
are not lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import TailRecord
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId, MetricRow, finite_or_text

__all__ = ["MAX_ROWS", "first_values", "last_values", "read_tails", "write_tail"]

MAX_ROWS = 100_000
"""As many as a checkpoint keeps; some 6 MB."""

_MAX_BYTES = 64 * 1024 * 1024

Tail = list[MetricRow]


def write_tail(store: Store, layout: RunLayout, attempt: int, rows: Sequence[MetricRow]) -> None:
    """Keep the newest `MAX_ROWS` rows."""
    record = TailRecord(
        attempt=attempt,
        kept_at=time.time(),
        rows=[
            (row.key, finite_or_text(row.value), row.step, row.time_ms) for row in rows[-MAX_ROWS:]
        ],
    )
    store.put(layout.tail(attempt), encode(record))


def read_tails(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    *,
    behind: CheckpointId | None,
    older_than: float = 0.0,
) -> list[Tail]:
    """What attempts have left behind a checkpoint, or behind none, oldest attempt first.

    Parameters
    ----------
    attempts
        Those that may have left some.
    behind
        The checkpoint; an attempt before the one that made it has left nothing behind it.
    older_than
        Seconds that each must have been there for any to count, by the clocks of who kept them
        and of this process. Where those disagree they are found earlier or later, which loses
        nothing.
    """
    first, step = (behind.attempt, behind.step) if behind is not None else (1, 0)
    tails = []
    for attempt in attempts:
        record = _read(store, layout, attempt.number) if attempt.number >= first else None
        if record is None:
            continue
        if older_than and time.time() - record.kept_at < older_than:
            return []  # the run may go on
        tails.append(
            [
                MetricRow(key, float(value), at, ms)
                for key, value, at, ms in record.rows
                if at >= step
            ]
        )
    return tails


def first_values(tails: Sequence[Tail]) -> Mapping[tuple[str, int], MetricRow]:
    """By metric and step, what was logged first."""
    found: dict[tuple[str, int], MetricRow] = {}
    for row in (row for tail in tails for row in tail):
        found.setdefault((row.key, row.step), row)
    return found


def last_values(tails: Sequence[Tail]) -> list[MetricRow]:
    """Of each metric and step what was logged last, in the order of steps."""
    found = {(row.key, row.step): row for tail in tails for row in tail}
    return sorted(found.values(), key=lambda row: (row.step, row.time_ms))


def _read(store: Store, layout: RunLayout, attempt: int) -> TailRecord | None:
    path = layout.tail(attempt)
    try:
        return decode(store.read(path, limit=_MAX_BYTES), TailRecord, path=path)
    except (ObjectNotFoundError, CorruptCheckpointError):
        # A damaged one is as lost as one that was never kept; no run needs it to go on.
        return None
