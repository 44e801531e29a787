"""What one listing of a run tells, to pass quickly over one with nothing to expire or collect.

A store may have thousands of runs, of which few change from one day to the next.
"""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.marks import is_tombstoned
from ckpt_tasks.format.layout import MARK_KINDS, MarkKind, RunLayout
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Inventory", "take_inventory"]


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """The objects of a run, none of which was read.

    Parameters
    ----------
    commits
        Checkpoints that have a record.
    marks
        Checkpoints by their marks.
    writes
        Attempt and sequence of every write that has data.
    size
        Bytes of all objects.
    """

    commits: set[CheckpointId]
    marks: dict[MarkKind, set[CheckpointId]]
    writes: set[tuple[int, int]]
    size: int

    @property
    def may_expire(self) -> bool:
        """Whether rules might mark anything: of a single checkpoint that is kept, none does."""
        kept = [one for one in self.commits if not is_tombstoned(one, self.marks)]
        return len(kept) > 1

    @property
    def may_be_collected(self) -> bool:
        """Whether there is anything that a collection would remove, now or after its grace."""
        going = self.marks["expired"] | self.marks["collecting"]
        committed = {(one.attempt, one.sequence) for one in self.commits}
        return bool(going or self.writes - committed)


def take_inventory(store: Store, layout: RunLayout) -> Inventory:
    """List a run, once. Raises `StoreError` where storage did not answer."""
    commits: set[CheckpointId] = set()
    marks: dict[MarkKind, set[CheckpointId]] = {kind: set() for kind in MARK_KINDS}
    writes: set[tuple[int, int]] = set()
    size = 0
    for info in store.list_objects(layout.folder):
        size += info.size
        checkpoint = layout.checkpoint_id(info.path)
        kind = info.path.removeprefix(layout.all_marks).partition("/")[0]
        if (write := layout.write_of(info.path)) is not None:
            writes.add(write)
        elif checkpoint is not None and info.path.startswith(layout.commits):
            commits.add(checkpoint)
        elif checkpoint is not None and kind in MARK_KINDS:
            marks[kind].add(checkpoint)
    return Inventory(commits=commits, marks=marks, writes=writes, size=size)
