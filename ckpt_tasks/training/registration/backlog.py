"""What a registry does not know of a run yet, told from the store alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from ckpt_tasks.checkpointer.catalog import list_checkpoints, read_checkpoints
from ckpt_tasks.checkpointer.marks import is_tombstoned, marked
from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.errors import CkptTasksError, CorruptCheckpointError
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RunRecord
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.registration.tail import last_values, read_tails
from ckpt_tasks.types import CheckpointId, MetricRow

__all__ = ["Backlog", "find_backlog"]


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be published of a run, and what has been.

    Parameters
    ----------
    missing
        Checkpoints to register, oldest first.
    registered
        Those that are, oldest first.
    rows
        Metrics that checkpoints kept and the registry does not have, in the order of logging.
    damaged
        Checkpoints that were found damaged.
    """

    missing: list[CommitRecord]
    registered: list[CommitRecord]
    rows: list[MetricRow]
    damaged: Collection[CheckpointId]

    @property
    def newest_registered(self) -> CommitRecord | None:
        """The newest that a retry may go on from."""
        return next((r for r in reversed(self.registered) if not r.nonfinite), None)


def find_backlog(
    store: Store,
    layout: RunLayout,
    *,
    run: RunRecord,
    registered: Collection[str],
    high_water: Mapping[str, int],
    tails_after: float | None = None,
) -> Backlog:
    """Compare the lineage's checkpoints with what a registry has.

    Damaged ones are left out, for recovery has reported them; of those that are no longer kept
    only the metrics count: nobody is to be pointed at them.

    Parameters
    ----------
    registered
        Checkpoints that the registry has.
    high_water
        Highest step of each metric that it has.
    tails_after
        Seconds after which what dead attempts logged behind the last checkpoint counts as well;
        0 of a run that is complete, where it is the last attempt's only; ``None`` of one that
        goes on, and does those steps again.

    Raises
    ------
    StoreError
        Storage did not answer.
    """
    attempts = read_attempts(store, layout)
    # Before the commits: a mark that is removed by now belongs to a record that is removed, too.
    marks = marked(store, layout)
    valid = trace_lineage(attempts).valid(list_checkpoints(store, layout))
    records = read_checkpoints(store, layout, valid, run=run)
    newest_sent = max(high_water.values(), default=-1)
    backlog = Backlog(missing=[], registered=[], rows=[], damaged=marks["quarantined"])
    for checkpoint in reversed(valid):
        record = records[checkpoint]
        if isinstance(record, CkptTasksError) or checkpoint in backlog.damaged:
            continue
        if not is_tombstoned(checkpoint, marks):
            known = record.id in registered
            (backlog.registered if known else backlog.missing).append(record)
        if record.position.step >= newest_sent:
            kept = _journal(store, layout, record)
            backlog.rows.extend(row for row in kept if row.step > high_water.get(row.key, -1))
    if tails_after is not None:
        newest = valid[0] if valid else None
        over = attempts if tails_after else attempts[-1:]
        tails = read_tails(store, layout, over, behind=newest, older_than=tails_after)
        committed = {(row.key, row.step) for row in backlog.rows}
        backlog.rows.extend(
            row
            for row in last_values(tails)
            if row.step > high_water.get(row.key, -1) and (row.key, row.step) not in committed
        )
    return backlog


def _journal(store: Store, layout: RunLayout, record: CommitRecord) -> list[MetricRow]:
    """The metrics that a checkpoint kept, with the time stamps they had."""
    try:
        index = read_index(store, layout, record.indexes[0])
    except CorruptCheckpointError:
        return []
    return [MetricRow(key, float(value), step, at) for key, value, step, at in index.metrics]
