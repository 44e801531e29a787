"""Marks on checkpoints: pinned, expired, quarantined, being collected; and the run's completion.

A mark's existence is what counts; its content is for people.
"""

from __future__ import annotations

from ckpt_tasks.errors import CorruptCheckpointError, ObjectExistsError, ObjectNotFoundError
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import MARK_KINDS, MarkKind, RunLayout
from ckpt_tasks.format.records import CompletedRecord, MarkRecord, now
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["mark", "marked", "read_completed", "read_mark", "write_completed"]

_MAX_MARK_BYTES = 64 * 1024


def mark(
    store: Store, layout: RunLayout, kind: MarkKind, checkpoint: CheckpointId, *, why: str, by: str
) -> None:
    """Put a mark on a checkpoint; no change where it stands already."""
    record = MarkRecord(checkpoint=str(checkpoint), why=why[:4000], by=by, at=now())
    try:
        store.create(layout.mark(kind, checkpoint), encode(record))
    except ObjectExistsError:
        return


def marked(store: Store, layout: RunLayout) -> dict[MarkKind, set[CheckpointId]]:
    """Every mark of the run."""
    found: dict[MarkKind, set[CheckpointId]] = {kind: set() for kind in MARK_KINDS}
    for kind in MARK_KINDS:
        for info in store.list_objects(layout.marks(kind)):
            checkpoint = layout.checkpoint_id(info.path)
            if checkpoint is not None:
                found[kind].add(checkpoint)
    return found


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
