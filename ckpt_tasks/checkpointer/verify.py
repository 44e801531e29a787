"""Proving, without restoring it, that a checkpoint is whole."""

from __future__ import annotations

import time

import msgspec

from ckpt_tasks.checkpointer.reader import iter_files, read_commit, read_index
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["VerifyReport", "state_digest", "verify_checkpoint"]


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
    """

    run: str
    checkpoint: str
    ok: bool
    problem: str | None
    files: int
    size: int
    seconds: float


def verify_checkpoint(store: Store, run: str, checkpoint: CheckpointId | str) -> VerifyReport:
    """Read every byte of a checkpoint and check it against the digests committed.

    Raises
    ------
    CheckpointNotFoundError
        There is no such checkpoint.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    layout = RunLayout(run)
    if isinstance(checkpoint, str):
        checkpoint = CheckpointId.parse(checkpoint)
    started = time.perf_counter()
    files = size = 0
    problem: str | None = None
    try:
        record = read_commit(store, layout, checkpoint)
        for ref in record.indexes:
            index = read_index(store, layout, ref)
            files, size = files + 1, size + ref.size
            for file, _ in iter_files(store, layout, index):
                files, size = files + 1, size + file.size
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


def state_digest(store: Store, run: str, checkpoint: CheckpointId | str) -> str:
    """A digest of the state alone: equal for two checkpoints that hold the same state, whatever
    run, attempt or write they belong to.

    It covers every tensor's dtype, shape and bytes and every other value, by the digests that
    were committed. Errors as `verify_checkpoint`, and `CorruptCheckpointError` for a damaged
    record or index.
    """
    layout = RunLayout(run)
    if isinstance(checkpoint, str):
        checkpoint = CheckpointId.parse(checkpoint)
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
