"""Checkpoints of several ranks, made without torch or processes by the real code."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from support.made_runs import MadeRun, State, Tensor, write_state

from ckpt_tasks.format.blocks import Part, whole
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.digest import chunk_spans, digest, digest_of_chunks
from ckpt_tasks.format.records import SharedTensor
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.types import CheckpointId

WRITE_ID = "a0009-s0001-0123456789ab"


def sharded(shape: Sequence[int], part: Part, position: int) -> Any:
    """The leaf of a rank that holds a part."""
    facts = {"shape": list(shape), "offsets": list(part.offsets), "parameter": True, "grad": True}
    return {"$": "sharded", "v": [facts, {"$": "tensor", "v": position}]}


def plain(position: int) -> Any:
    return {"$": "tensor", "v": position}


def values_of(data: bytes, shape: tuple[int, int], part: Part) -> bytes:
    """A block of a matrix of bytes."""
    first, last = part.offsets[1], part.offsets[1] + part.sizes[1]
    rows = range(part.offsets[0], part.offsets[0] + part.sizes[0])
    if part.sizes[1] == shape[1]:
        return data[rows.start * shape[1] : rows.stop * shape[1]]
    return b"".join(data[row * shape[1] + first : row * shape[1] + last] for row in rows)


def part_of_rank(
    name: str, key: str, data: bytes, shape: tuple[int, int], part: Part | None = None
) -> Tensor:
    """A matrix of bytes, or a block of it, as a rank writes it."""
    block = part or whole(shape)
    return Tensor(name, key, values_of(data, shape, block), extents=block.sizes)


def shared(position: int, tensor: Tensor, *, rank: int = 0) -> SharedTensor:
    """A tensor that another rank has written."""
    chunks = [digest(tensor.data[start:stop]) for start, stop in chunk_spans(len(tensor.data))]
    own = digest_of_chunks(chunks)
    return SharedTensor(position=position, rank=rank, item=tensor.item, key=tensor.key, digest=own)


def commit_ranks(
    run: MadeRun, states: Sequence[State], left_to_others: Sequence[Sequence[SharedTensor]] = ()
) -> CheckpointId:
    """A checkpoint that as many ranks have saved as there are states."""
    checkpoint = run.begin().save(10, State())
    refs = [
        write_state(
            run.store,
            run.layout,
            state,
            write_id=WRITE_ID,
            rank=rank,
            world_size=len(states),
            shared=list(left_to_others[rank]) if left_to_others else [],
        ).ref
        for rank, state in enumerate(states)
    ]
    record = msgspec.structs.replace(
        run.record(checkpoint), world_size=len(states), indexes=refs, write_id=WRITE_ID
    )
    run.store.put(run.layout.commit(checkpoint), encode(record))
    return checkpoint


class CountingStore(WrapperStore):
    """Counts what is read of tensors, and keeps which bytes of which file that was."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.spans: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        with self._lock:
            self.spans.append((path, start, stop))
        super().read_into(path, start, stop, buffer)

    @property
    def bytes_read(self) -> int:
        return sum(stop - start for _, start, stop in self.spans)

    @property
    def requests(self) -> Counter[str]:
        """Reads of each file, by its name."""
        return Counter(path.rpartition("/")[2] for path, _, _ in self.spans)

    def read_twice(self) -> int:
        """Bytes that were read more than once, but for the pages at the edges of two reads."""
        twice = 0
        by_file: dict[str, int] = {}
        for path, start, stop in sorted(self.spans):
            end = by_file.get(path, 0)
            twice += max(0, min(end, stop) - start - 4096)
            by_file[path] = max(end, stop)
        return twice
