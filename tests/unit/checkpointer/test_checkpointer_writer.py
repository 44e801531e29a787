"""Writing one rank's files and index."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open
from support.made_runs import HookedStore, State, Tensor, memory_store, write_state

from ckpt_tasks.checkpointer.writer import WrittenRank
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Index
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.testing.wrappers import Operation

LAYOUT = RunLayout("digits")
WRITE_ID = "a0001-s0001-0123456789ab"


@pytest.fixture
def store() -> Store:
    return memory_store()


def write(store: Store, state: State) -> WrittenRank:
    return write_state(store, LAYOUT, state, write_id=WRITE_ID)


def paths(store: Store) -> list[str]:
    return [info.path for info in store.list_objects("")]


def test_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    """One file an item, each readable by name with dtype, shape and bytes as they were."""
    state = State(
        {"model": {}, "optimizer": {}},
        [
            Tensor("model", "weight", bytes(range(24)), "F32", (2, 3)),
            Tensor("optimizer", "0.step", bytes(4), "F32", ()),
            Tensor("model", "bias", b"\x01\x02\x03\x04", "I16", (2,)),
        ],
    )
    with open_store(str(tmp_path), for_writing=True) as store:
        write(store, state)
    folder = tmp_path / LAYOUT.in_run(LAYOUT.write_folder_in_run(WRITE_ID))
    with safe_open(folder / "model.rank0000.safetensors", "np") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert file.metadata() == {"format": "pt", "ckpt_tasks": "model"}
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    assert (weight.shape, weight.dtype.str, weight.tobytes()) == ((2, 3), "<f4", bytes(range(24)))
    assert (bias.shape, bias.dtype.str, bias.tobytes()) == ((2,), "<i2", b"\x01\x02\x03\x04")
    with safe_open(folder / "optimizer.rank0000.safetensors", "np") as file:
        assert file.get_tensor("0.step").shape == ()


def test_index_names_every_byte(store: Store) -> None:
    """Sizes, offsets and digests in the index are those of the bytes in the store."""
    large = bytes(range(256)) * (CHUNK_BYTES // 128)  # two chunks
    state = State({}, [Tensor("a", "x", b"abc"), Tensor("b", "y", large), Tensor("a", "z", b"d")])
    written = write(store, state)
    data = store.read(LAYOUT.in_run(written.ref.path))
    assert (written.ref.size, written.ref.digest) == (len(data), digest(data))
    index = decode(data, Index, path="index")
    assert index == written.index
    assert [tensor.key for tensor in index.tensors] == ["x", "y", "z"]
    for tensor, original in zip(index.tensors, state.tensors, strict=True):
        entry = index.files[tensor.file]
        content = store.read(LAYOUT.in_run(entry.path))
        assert entry.size == len(content)
        assert entry.header_digest == digest(content[: entry.header_size])
        stored = content[tensor.offset : tensor.offset + tensor.size]
        assert stored == original.data
        assert tensor.chunks == [digest(stored[i:j]) for i, j in chunk_spans(len(stored))]
    assert written.size == sum(info.size for info in store.list_objects(""))


def test_tensors_start_on_a_page(store: Store) -> None:
    """The header is padded to 4 KiB, so that a mapping of the first tensor is aligned."""
    index = write(store, State({}, [Tensor("a", "x", b"abc")])).index
    assert index.tensors[0].offset == 4096


def test_several_items_with_odd_names(store: Store) -> None:
    """Each item has a file of its own, whatever characters its name has."""
    names = ["model", "model/2", "ema model", "..", "ß"]
    index = write(store, State({}, [Tensor(name, "x", b"1") for name in names])).index
    assert len({file.path for file in index.files}) == len(names)
    assert all("/../" not in file.path for file in index.files)


def test_empty_tensor(store: Store) -> None:
    """A tensor without elements has a place, a shape and no chunk."""
    state = State({}, [Tensor("a", "empty", b"", "F32", (0, 3)), Tensor("a", "x", b"1")])
    empty, other = write(store, state).index.tensors
    assert (empty.size, empty.shape, empty.chunks) == (0, [0, 3], [])
    assert other.size == 1


def test_no_tensors(store: Store) -> None:
    """State without tensors is an index alone."""
    written = write(store, State({"loop": {"best": 1}}))
    assert written.index.files == []
    assert written.index.items == {"loop": {"best": 1}}
    assert paths(store) == [LAYOUT.in_run(written.ref.path)]


def test_metrics_stand_in_the_index(store: Store) -> None:
    """Rows logged since the previous checkpoint survive with it."""
    rows = [("loss", 0.5, 1, 1000), ("loss", "nan", 2, 1001)]
    written = write_state(store, LAYOUT, State(), write_id=WRITE_ID, metrics=rows)
    assert written.index.metrics == rows


@pytest.mark.parametrize("size", [1, 300_000], ids=["alone", "digested meanwhile"])
@pytest.mark.parametrize("failing", ["model", "optimizer", "index"])
def test_failure_removes_what_was_written(store: Store, failing: str, size: int) -> None:
    """Whichever write fails, no object of this write stays, and the error is passed on."""

    def before(operation: Operation, path: str) -> None:
        if operation == "write" and f"/{failing}" in path.replace("rank0000.index", "index"):
            raise StoreError("no space")

    state = State({}, [Tensor("model", "x", b"1" * size), Tensor("optimizer", "y", b"2" * size)])
    with pytest.raises(StoreError, match="no space"):
        write(HookedStore(store, before), state)
    assert paths(store) == []


def test_interrupt_removes_what_was_written(store: Store) -> None:
    """An interrupt in the middle is no reason to leave bytes behind."""

    def before(operation: Operation, path: str) -> None:
        if operation == "write" and "optimizer" in path:
            raise KeyboardInterrupt

    state = State({}, [Tensor("model", "x", b"1"), Tensor("optimizer", "y", b"2")])
    with pytest.raises(KeyboardInterrupt):
        write(HookedStore(store, before), state)
    assert paths(store) == []


def test_failure_while_removing_hides_nothing(store: Store) -> None:
    """Where the store fails for good, the first error is the one that is raised."""

    def before(operation: Operation, path: str) -> None:
        if operation == "delete":
            raise StoreError("unreachable")
        if operation == "write" and "optimizer" in path:
            raise StoreError("no space")

    state = State({}, [Tensor("model", "x", b"1"), Tensor("optimizer", "y", b"2")])
    with pytest.raises(StoreError, match="no space"):
        write(HookedStore(store, before), state)


def test_equal_state_gives_equal_entries(store: Store) -> None:
    """Two writes of one state differ in their paths alone."""
    state = State({"a": {}}, [Tensor("a", "x", b"abc")])
    one = write_state(store, LAYOUT, state, write_id="a0001-s0001-01").index
    two = write_state(store, LAYOUT, state, write_id="a0002-s0009-02").index
    assert one.tensors == two.tensors
    assert one.files[0].path != two.files[0].path
    assert msgspec.structs.replace(one.files[0], path="") == msgspec.structs.replace(
        two.files[0], path=""
    )
