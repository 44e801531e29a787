"""Marks on checkpoints: pinned, expired, quarantined, being collected, verified; and the run's
completion.

A mark's existence is what counts; its content is for people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckpt_tasks.errors import CorruptCheckpointError, ObjectExistsError, ObjectNotFoundError
from ckpt_tasks.fencing.process import this_uptime
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import MARK_KINDS, MarkKind, RunLayout
from ckpt_tasks.format.records import CompletedRecord, MarkRecord, now
from ckpt_tasks.store.base import ObjectInfo, Store
from ckpt_tasks.types import CheckpointId

__all__ = [
    "is_tombstoned",
    "list_marks",
    "mark",
    "marked",
    "read_completed",
    "read_mark",
    "write_completed",
]

_MAX_MARK_BYTES = 64 * 1024


def mark(
    store: Store, layout: RunLayout, kind: MarkKind, checkpoint: CheckpointId, *, why: str, by: str
) -> None:
    """Put a mark on a checkpoint; no change where it stands already."""
    record = MarkRecord(
        checkpoint=str(checkpoint), why=why[:4000], by=by, at=now(), uptime=this_uptime()
    )
    try:
        store.create(layout.mark(kind, checkpoint), encode(record))
    except ObjectExistsError:
        return


def list_marks(store: Store, layout: RunLayout) -> dict[MarkKind, dict[CheckpointId, ObjectInfo]]:
    """Every mark of the run, by one listing."""
    found: dict[MarkKind, dict[CheckpointId, ObjectInfo]] = {kind: {} for kind in MARK_KINDS}
    for info in store.list_objects(layout.all_marks):
        checkpoint = layout.checkpoint_id(info.path)
        kind = info.path.removeprefix(layout.all_marks).partition("/")[0]
        if checkpoint is not None and kind in MARK_KINDS:
            found[kind][checkpoint] = info
    return found


def marked(store: Store, layout: RunLayout) -> dict[MarkKind, set[CheckpointId]]:
    """Which checkpoints of the run have which mark."""
    return {kind: set(marks) for kind, marks in list_marks(store, layout).items()}


def is_tombstoned(
    checkpoint: CheckpointId, marks: Mapping[MarkKind, Collection[CheckpointId]]
) -> bool:
    """Whether a checkpoint is no longer kept. A pin outweighs its expiry, not its collection."""
    expired = checkpoint in marks["expired"] and checkpoint not in marks["pins"]
    return expired or checkpoint in marks["collecting"]


def read_mark(
    store: Store, layout: RunLayout, kind: MarkKind, checkpoint: CheckpointId
) -> MarkRecord | None:
    """A mark's content; ``None`` where there is no mark, or no readable one."""
    path = layout.mark(kind, checkpoint)
    try:
        return decode(store.read(path, limit=_MAX_MARK_BYTES), MarkRecord, path=path)
    except (ObjectNotFoundError, CorruptCheckpointError):
        return None


def read_completed(store: Store, layout: RunLayout) -> CompletedRecord | None:
    """The run's completion marker.

    Raises `CorruptCheckpointError` when it is damaged; the run then counts as not complete.
    """
    try:
        data = store.read(layout.completed, limit=_MAX_MARK_BYTES)
    except ObjectNotFoundError:
        return None
    return decode(data, CompletedRecord, path=layout.completed)


def write_completed(store: Store, layout: RunLayout, record: CompletedRecord) -> None:
    """Mark the run as complete; a later attempt's completion replaces an earlier one's."""
    store.put(layout.completed, encode(record))
