"""Reading tensors one behind another in bounded memory, however large they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_tasks.checkpointer.sharded_reader import Block, ShardedCheckpoint
from ckpt_tasks.checkpointer.stored import StoredTensor
from ckpt_tasks.checkpointer.windows import PARALLEL_WINDOWS, WINDOW_BYTES
from ckpt_tasks.format.blocks import split, whole

__all__ = ["BATCH_BYTES", "stream_tensors"]

BATCH_BYTES = PARALLEL_WINDOWS * WINDOW_BYTES
"""What is held at once. Where two batches meet within a chunk, that is read for both."""


def stream_tensors(
    checkpoint: ShardedCheckpoint, tensors: Iterable[StoredTensor]
) -> Iterator[memoryview]:
    """The bytes of each tensor, row-major, piece by piece and in order, verified.

    Tensors that lie in parts are put together, and small ones are read together. Whoever releases
    a piece before the next one is asked for never holds two batches.

    Raises
    ------
    CorruptCheckpointError
        A chunk that holds some of them is not what was committed, or nothing holds it.
    StoreError
        Storage failed.
    """
    batch: list[Block] = []
    free = BATCH_BYTES
    for tensor, piece in _pieces(tensors):
        size = tensor.size_of(piece)
        if batch and size > free:
            yield from _read(checkpoint, batch)
            batch, free = [], BATCH_BYTES
        batch.append((tensor, piece))
        free -= size
    yield from _read(checkpoint, batch)


def _read(checkpoint: ShardedCheckpoint, batch: list[Block]) -> Iterator[memoryview]:
    for image in checkpoint.read(batch):
        yield image.data


def _pieces(tensors: Iterable[StoredTensor]) -> Iterator[Block]:
    for tensor in tensors:
        for piece in split(whole(tensor.shape), max(1, BATCH_BYTES // max(1, tensor.unit))):
            yield tensor, piece
