"""A staged save as a job: all that is needed to write and commit it, by whichever process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec

from ckpt_tasks.checkpointer.commit import commit
from ckpt_tasks.checkpointer.earlier import Earlier
from ckpt_tasks.checkpointer.gather import GatheredRanks, gather_indexes
from ckpt_tasks.checkpointer.given_up import GivenUpWrites
from ckpt_tasks.checkpointer.image import Image
from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.checkpointer.references import Base
from ckpt_tasks.checkpointer.writer import WrittenRank, remove_rank, write_rank
from ckpt_tasks.errors import CkptTasksError, CorruptCheckpointError, StoreError
from ckpt_tasks.events import CheckpointCommitted
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    ROW_BLOCKS,
    CommitRecord,
    IndexRef,
    RowBlocks,
    SharedTensor,
    now,
)
from ckpt_tasks.garbage import without_collection
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Number

__all__ = ["NAMED_PARAMETERS", "JobRunner", "SaveJob", "committed_event"]

NAMED_PARAMETERS = 20
"""With NaN or infinity, that a commit record names: it is small."""


class SaveJob(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of a save, its bytes in the arena.

    Parameters
    ----------
    image
        The `Image` of its files, encoded: a plan is encoded once and used again.
    trees
        Tracked name to JSON-ready tree, encoded.
    rows
        Metric rows for the index.
    draft
        The commit record without what only the writing tells.
    seconds
        What training waited for the save so far.
    rank
        Whose part it is, of the draft's world size. Rank 0's job ends with the commit, others'
        with their part durable.
    shared
        What another rank writes, as in `Index`.
    row_blocks
        Tensors that were split, as in `Index`.
    gather_seconds
        How long rank 0 waits for the others' parts, when its own is written.
    whole
        Nothing is referred to, whatever earlier checkpoints hold.
    """

    image: msgspec.Raw
    trees: msgspec.Raw
    rows: list[tuple[str, Number, int, int]]
    draft: CommitRecord
    seconds: float
    rank: int = 0
    shared: list[SharedTensor] = []
    row_blocks: list[RowBlocks] = []
    gather_seconds: float = 600.0
    whole: bool = False

    @property
    def commits(self) -> bool:
        """Whether it is this job that makes the checkpoint."""
        return self.rank == 0

    def renamed(self, identifier: str, write_id: str) -> SaveJob:
        """The same save as another checkpoint: nothing that was begun is ever written over."""
        draft = msgspec.structs.replace(self.draft, id=identifier, write_id=write_id)
        return msgspec.structs.replace(self, draft=draft)


class JobRunner:
    """Writes and commits the jobs of one attempt, in whichever process.

    Parameters
    ----------
    incremental
        Tensors that an earlier checkpoint's files hold already are not written again.
    base
        Names the index of the checkpoint that the attempt started from.
    failure
        Of a checkpoint's id: why some rank will not write its part of it, once that is known.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        fence: Fence,
        *,
        incremental: bool = True,
        base: IndexRef | None = None,
        failure: Callable[[str], str | None] = lambda checkpoint: None,
    ) -> None:
        self._store = store
        self._layout = layout
        self._fence = fence
        self._failure = failure
        self._base = base
        self._given_up = GivenUpWrites(store, layout)
        self._earlier = Earlier() if incremental else None
        age = layout.write_of(base.path) if base is not None else None
        self._latest = Base(age) if age is not None else None

    @without_collection()
    def run(self, job: SaveJob, memory: memoryview) -> CommitRecord:
        """Write the job's files and index, and commit; when this returns, the checkpoint exists.

        Of several ranks, rank 0 waits for the others and commits; the others' records name their
        own part, and stand in no store.

        Parameters
        ----------
        memory
            The arena, as far as the image goes.

        Raises
        ------
        StaleAttemptError
            A later attempt owns the run.
        ConfigError
            The commit record would be larger than any may be.
        StoreError
            Storage failed.
        """
        self._fence.check_claimed()
        known = self._known(whole=job.whole)
        if self._earlier is not None:
            # Should this save fail, the next one writes everything: what this one refers to may
            # be the reason.
            self._earlier = Earlier()
        started = time.perf_counter()
        written = self._write(job, memory, known)
        record = msgspec.structs.replace(
            job.draft,
            timings={**job.draft.timings, "write": time.perf_counter() - started},
            size=written.size,
            written=written.written,
            indexes=[written.ref],
            created_at=now(),
        )
        if job.commits:
            record = self._commit(job, record, written)
        if self._earlier is not None:
            self._earlier = written.earlier
        return record

    def _write(self, job: SaveJob, memory: memoryview, known: Earlier | None) -> WrittenRank:
        try:
            return write_rank(
                self._store,
                self._layout,
                msgspec.msgpack.decode(job.image, type=Image),
                memory,
                msgspec.msgpack.decode(job.trees),
                write_id=job.draft.write_id,
                rank=job.rank,
                world_size=job.draft.world_size,
                metrics=job.rows,
                earlier=known,
                shared=job.shared,
                nonfinite=job.draft.nonfinite,
                row_blocks=job.row_blocks,
            )
        except StoreError:
            if job.commits and job.draft.world_size > 1:
                self._given_up.add(job.draft.write_id)
            raise

    def _commit(self, job: SaveJob, record: CommitRecord, written: WrittenRank) -> CommitRecord:
        """Commit, when all ranks' parts are there; the record that was committed."""
        indexes = [written.index]
        if record.world_size > 1:
            gathered = self._gather(job, record, written)
            indexes = gathered.indexes
            record = msgspec.structs.replace(
                record,
                size=gathered.size,
                written=gathered.written,
                indexes=gathered.refs,
                nonfinite=gathered.nonfinite[:NAMED_PARAMETERS],
            )
        if any(index.row_blocks for index in indexes):
            record = msgspec.structs.replace(record, required_features=[ROW_BLOCKS])
        try:
            commit(self._store, self._layout, self._fence, record, indexes, base=self._latest)
        except CkptTasksError:
            self._given_up.leave()
            raise
        self._given_up.settle(indexes)
        self._latest = Base.of(record, indexes)
        return record

    def _gather(self, job: SaveJob, record: CommitRecord, written: WrittenRank) -> GatheredRanks:
        """All ranks' parts; where one does not come, this one's is removed: nobody can want it."""
        try:
            return gather_indexes(
                self._store,
                self._layout,
                record.write_id,
                record.world_size,
                written.ref,
                seconds=job.gather_seconds,
                failure=lambda: self._failure(record.id),
            )
        except StoreError:
            remove_rank(self._store, self._layout, record.write_id, written)
            self._given_up.add(record.write_id)
            raise

    def _known(self, *, whole: bool) -> Earlier | None:
        """What is held already; first, what the checkpoint holds that the attempt started from."""
        base, self._base = self._base, None
        if whole and self._earlier is not None:
            return Earlier()
        if base is not None and self._earlier is not None:
            # Damaged or out of reach, it is just not referred to.
            with contextlib.suppress(CorruptCheckpointError, StoreError):
                self._earlier = Earlier(read_index(self._store, self._layout, base))
        return self._earlier


def committed_event(record: CommitRecord, seconds: float) -> CheckpointCommitted:
    """What is told of a commit; `seconds` is what training waited for it."""
    return CheckpointCommitted(
        checkpoint=record.id,
        position=record.position,
        trigger=record.trigger,
        reason=record.reason,
        size=record.size,
        seconds=seconds,
        drain=record.timings.get("write", 0.0),
    )
