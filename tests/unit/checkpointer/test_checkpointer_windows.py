"""Reading piece by piece: which bytes are asked for, into which memory, and where they end up."""

from __future__ import annotations

import ctypes

import msgspec
import pytest
from support.made_runs import MadeRun, State, Tensor

from ckpt_tasks.checkpointer.memory import memory_for
from ckpt_tasks.checkpointer.reader import check_files, load_checkpoint, load_tensors, read_index
from ckpt_tasks.checkpointer.windows import PARALLEL_WINDOWS, WINDOW_BYTES, chunks_of, windows
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.digest import CHUNK_BYTES
from ckpt_tasks.format.records import Index, TensorEntry
from ckpt_tasks.format.safetensors import TENSOR_ALIGNMENT
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.types import CheckpointId


class WatchedStore(WrapperStore):
    """Notes which bytes are read into which memory."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.spans: list[tuple[int, int]] = []
        self.memory: dict[int, int] = {}

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        super().read_into(path, start, stop, buffer)
        self.spans.append((start, stop))
        address = address_of(buffer)
        self.memory[address] = max(buffer.nbytes, self.memory.get(address, 0))


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def save(run: MadeRun, tensors: list[Tensor]) -> tuple[CheckpointId, Index]:
    """A checkpoint of one file with these tensors, and its index."""
    checkpoint = run.begin().save(10, State({"model": {}}, tensors))
    return checkpoint, read_index(run.store, run.layout, run.record(checkpoint).indexes[0])


def entry(offset: int, size: int) -> TensorEntry:
    chunks = ["0" * 64] * -(-size // CHUNK_BYTES)
    return TensorEntry(
        file=0, key="t", dtype="U8", shape=[size], offset=offset, size=size, chunks=chunks
    )


def test_memory_beside_the_tensors_is_bounded() -> None:
    """A few windows, used again and again, however large the checkpoint is."""
    run = MadeRun()
    size = 3 * PARALLEL_WINDOWS * WINDOW_BYTES
    checkpoint, index = save(run, [Tensor("model", "w", bytes(size))])
    bound = PARALLEL_WINDOWS * (WINDOW_BYTES + 2 * 4096)
    loading, checking = WatchedStore(run.store), WatchedStore(run.store)
    load_checkpoint(loading, run.layout, run.record(checkpoint))
    assert len(list(check_files(checking, run.layout, index))) == 1
    for store in (loading, checking):
        assert sum(stop - start for start, stop in store.spans) >= size
        assert sum(store.memory.values()) <= bound < size


def test_each_tensor_begins_where_torch_would_put_it() -> None:
    """Also behind one of an odd size: otherwise it would be copied once more."""
    run = MadeRun()
    contents = {"odd": b"\x01" * 7, "empty": b"", "next": b"\x02" * 100, "last": b"\x03" * 65}
    checkpoint, index = save(run, [Tensor("model", key, data) for key, data in contents.items()])
    loaded = load_checkpoint(run.store, run.layout, run.record(checkpoint)).tensors
    assert [bytes(loaded[p]) for p in range(4)] == [contents[t.key] for t in index.tensors]
    filled = [tensor for tensor in loaded.values() if tensor.nbytes]
    assert {address_of(tensor) % TENSOR_ALIGNMENT for tensor in filled} == {0}


def test_tensors_share_no_memory() -> None:
    """Not a byte: each belongs to whoever restores it."""
    tensors = memory_for({0: 100, 1: 100, 5: 10})
    tensors[0][:] = b"\x01" * 100
    assert bytes(tensors[1]) == bytes(100)
    tensors[1][:] = b"\x02" * 100
    assert bytes(tensors[5]) == bytes(10)


def test_a_file_may_hold_more_than_the_index_names() -> None:
    """As the file of an earlier write does: only what is named is read and has to match."""
    run = MadeRun()
    contents = {"a": b"\x01" * 50, "old": b"\x02" * (3 * WINDOW_BYTES), "c": b"\x03" * 9}
    _, whole = save(run, [Tensor("model", key, data) for key, data in contents.items()])
    named = [tensor for tensor in whole.tensors if tensor.key != "old"]
    index = msgspec.structs.replace(whole, tensors=named)
    store = WatchedStore(run.store)

    loaded = load_tensors(store, run.layout, index, None)

    assert [bytes(loaded[0]), bytes(loaded[1])] == [contents["a"], contents["c"]]
    assert sum(stop - start for start, stop in store.spans) < WINDOW_BYTES
    assert len(list(check_files(run.store, run.layout, index))) == 1
    wrong = msgspec.structs.replace(named[1], dtype="I8")
    with pytest.raises(CorruptCheckpointError, match="differ on 'c'"):
        load_tensors(
            run.store, run.layout, msgspec.structs.replace(index, tensors=[named[0], wrong]), None
        )


def test_two_tensors_may_name_the_same_bytes() -> None:
    """As equal tensors do that are stored once: both come back, in memory of their own."""
    run = MadeRun()
    data = b"\x07" * (WINDOW_BYTES + 5)
    _, whole = save(run, [Tensor("model", "a", data), Tensor("model", "b", b"b")])
    first, second = whole.tensors
    index = msgspec.structs.replace(whole, tensors=[first, second, first])

    loaded = load_tensors(run.store, run.layout, index, None)

    assert [bytes(loaded[p]) for p in range(3)] == [data, b"b", data]
    loaded[0][0] = 0
    assert bytes(loaded[2]) == data
    assert len(list(check_files(run.store, run.layout, index))) == 1


def test_windows_cover_every_chunk_once() -> None:
    """In the file's order, none larger than a window, and not across a wide gap."""
    mebibyte = 1024 * 1024
    entries = {
        0: entry(4096, 10),
        1: entry(4106, 3 * CHUNK_BYTES + 1),
        2: entry(4106 + 3 * CHUNK_BYTES + 1 + 2 * mebibyte, 10),
        3: entry(4106 + 3 * CHUNK_BYTES + 1 + 2 * mebibyte + 10 + mebibyte // 2, 10),
    }
    made = list(windows(c for p, tensor in entries.items() for c in chunks_of(p, tensor)))
    assert [[(c.position, c.number) for c in window] for window in made] == [
        [(0, 0), (1, 0)],
        [(1, 1), (1, 2)],
        [(1, 3)],
        [(2, 0), (3, 0)],
    ]
    assert all(window[-1].stop - window[0].start <= WINDOW_BYTES for window in made)
