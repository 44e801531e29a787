"""Proving, without restoring it, that a checkpoint is whole."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.checkpointer.reader import check_files, read_commit, read_index
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, IndexRef
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = [
    "VerifyReport",
    "check_checkpoint",
    "mark_verified",
    "state_digest",
    "verify_checkpoint",
]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    Parameters
    ----------
    ok
        Every byte of every file is what was committed.
    problem
        The first thing that is not.
    files, size
        How many files, and bytes of them, were read and found right.
    seconds
        How long it took: with `size`, what a restore from here would wait for.
    unmarked
        Why a collection does not learn of it, and may read all of it once more.
    """

    run: str
    checkpoint: str
    ok: bool
    problem: str | None
    files: int
    size: int
    seconds: float
    unmarked: str | None = None


def verify_checkpoint(store: Store, run: str, checkpoint: CheckpointId | str) -> VerifyReport:
    """Read every byte of a checkpoint and check it against the digests committed.

    Memory is bounded, however large the checkpoint is; torch is not needed.

    Raises
    ------
    ConfigError
        `checkpoint` is no checkpoint's id, or the run's own record is damaged.
    UnsupportedFormatError
        A later version wrote it.
    CheckpointNotFoundError
        There is no such run or checkpoint.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    layout, checkpoint = RunLayout(run), _parsed(checkpoint)
    identity = read_run(store, layout)
    started = time.perf_counter()
    files = size = 0
    problem: str | None = None
    try:
        record = read_commit(store, layout, checkpoint, run=identity)
        for ref in record.indexes:
            for read in _check_rank(store, layout, ref):
                files, size = files + 1, size + read
    except CorruptCheckpointError as error:
        problem = str(error)
    return VerifyReport(
        run=run,
        checkpoint=str(checkpoint),
        ok=problem is None,
        problem=problem,
        files=files,
        size=size,
        seconds=time.perf_counter() - started,
    )


def mark_verified(store: Store, run: str, checkpoint: CheckpointId | str, *, by: str) -> None:
    """Have collections know that every byte of a checkpoint was read and is right.

    Parameters
    ----------
    by
        Who has read it, for people.

    Raises
    ------
    StoreError
        Storage does not take the mark.
    """
    layout, checkpoint = RunLayout(run), _parsed(checkpoint)
    why = "every byte was read, and is what was committed"
    mark(store, layout, "verified", checkpoint, why=why, by=by)
    if not store.exists(layout.commit(checkpoint)):  # collected while it was read
        store.delete(layout.mark("verified", checkpoint))


def check_checkpoint(store: Store, layout: RunLayout, record: CommitRecord) -> None:
    """`verify_checkpoint` of a record that has been read, for those who go on only if it holds.

    Raises
    ------
    CorruptCheckpointError
        Any byte of any file is not what was committed.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    for ref in record.indexes:
        for _ in _check_rank(store, layout, ref):
            pass


def _check_rank(store: Store, layout: RunLayout, ref: IndexRef) -> Iterator[int]:
    """Verify a rank's index, then its files; yields the size of each that is whole."""
    index = read_index(store, layout, ref)
    yield ref.size
    for file in check_files(store, layout, index):
        yield file.size


def _parsed(checkpoint: CheckpointId | str) -> CheckpointId:
    if isinstance(checkpoint, CheckpointId):
        return checkpoint
    try:
        return CheckpointId.parse(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def state_digest(store: Store, run: str, checkpoint: CheckpointId | str) -> str:
    """A digest of the state alone: equal for two checkpoints that hold the same state, whatever
    run, attempt or write they belong to.

    It covers every tensor's dtype, shape and bytes and every other value, by the digests that
    were committed. Errors as `verify_checkpoint`, and `CorruptCheckpointError` for a damaged
    record or index.
    """
    layout, checkpoint = RunLayout(run), _parsed(checkpoint)
    record = read_commit(store, layout, checkpoint)
    indexes = [read_index(store, layout, ref) for ref in record.indexes]
    state = [
        [
            index.rank,
            index.items,
            [[tensor.key, tensor.dtype, tensor.shape, tensor.chunks] for tensor in index.tensors],
        ]
        for index in indexes
    ]
    return digest(msgspec.json.encode(state))
