"""Looking into a checkpoint: only what is asked for is read, and nothing that is not verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.made_runs import HookedStore, MadeRun, State, Tensor, memory_store

from ckpt_tasks.checkpointer.lazy import LazyTensor, open_checkpoint
from ckpt_tasks.errors import CorruptCheckpointError, StoreError
from ckpt_tasks.format.digest import CHUNK_BYTES
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId

LARGE = b"\x05" * (CHUNK_BYTES + 3)
TREES: dict[str, Any] = {
    "model": {
        "$": "state_dict",
        "v": [{"$": "dict", "v": [["w", {"$": "tensor", "v": 0}]]}, {}],
    },
    "optimizer": {"state": {"$": "dict", "v": [[0, {"m": {"$": "tensor", "v": 1}}]]}, "lr": 0.1},
    "ema": [{"$": "tensor", "v": {"index": 0, "grad": True}}],
    "sparse": {"$": "sparse", "v": {"layout": "coo", "values": {"$": "tensor", "v": 2}}},
    "bare": {"$": "tensor", "v": 2},
    "loop": {"best": 1, "device": {"$": "device", "v": "cpu"}},
}


def state(trees: dict[str, Any] = TREES) -> State:
    tensors = [
        Tensor("model", "w", LARGE),
        Tensor("optimizer", "state.0.m", b"moment"),
        Tensor("bare", "bare", b"bare"),
    ]
    return State(trees, tensors)


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> MadeRun:
    """In a store that can map its files, and in one that reads ranges."""
    return MadeRun(LocalStore(str(tmp_path)) if request.param == "local" else memory_store())


def opened(run: MadeRun, checkpoint: CheckpointId) -> dict[str, dict[str, LazyTensor]]:
    return open_checkpoint(run.store, run.layout, run.record(checkpoint))


def test_names_and_keys_are_those_of_the_state(run: MadeRun) -> None:
    """Shared tensors stand under each name; what holds none is there all the same."""
    found = opened(run, run.begin().save(10, state()))
    assert {name: list(tensors) for name, tensors in found.items()} == {
        "model": ["w"],
        "optimizer": ["state.0.m"],
        "ema": ["0"],
        "sparse": ["values"],
        "bare": ["bare"],
        "loop": [],
    }
    assert found["ema"]["0"].details == {"grad": True}
    shared = found["ema"]["0"]
    assert (shared.dtype, shared.shape, shared.size) == ("U8", (len(LARGE),), len(LARGE))


def test_bytes_are_those_that_were_saved_and_cannot_be_changed(run: MadeRun) -> None:
    """Read-only views; what is written to the private ones reaches no file and no other reader."""
    checkpoint = run.begin().save(10, state())
    tensor = opened(run, checkpoint)["model"]["w"]
    view = tensor.read()
    assert (bytes(view), view.readonly) == (LARGE, True)
    tensor.read_private()[0] = 9
    assert bytes(opened(run, checkpoint)["model"]["w"].read()) == LARGE


def test_only_what_is_asked_for_is_read(run: MadeRun) -> None:
    """Listing reads the index; a tensor, its own file."""
    checkpoint = run.begin().save(10, state())
    record = run.record(checkpoint)
    asked: list[str] = []
    store = HookedStore(run.store, lambda operation, path: asked.append(path))

    found = open_checkpoint(store, run.layout, record)

    assert [path.rpartition("/")[2] for path in asked if not path.endswith(".index.json")] == []
    assert bytes(found["optimizer"]["state.0.m"].read()) == b"moment"
    names = {path.rpartition("/")[2] for path in asked}
    assert names == {"rank0000.index.json", "optimizer.rank0000.safetensors"}


@pytest.mark.parametrize("position", [3, -1, -CHUNK_BYTES])
def test_damage_is_found_at_every_look(run: MadeRun, position: int) -> None:
    """In the header or any chunk; tensors of other files can still be looked at."""
    checkpoint = run.begin().save(10, state())
    run.damage(run.tensors_path(checkpoint), position=position)
    found = opened(run, checkpoint)
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError, match=r"model\.rank0000\.safetensors"):
            found["model"]["w"].read()
    assert bytes(found["bare"]["bare"].read()) == b"bare"


def test_wrong_size_is_refused_before_it_is_mapped(run: MadeRun) -> None:
    """A file that ends early would end the process that looks at its mapping."""
    checkpoint = run.begin().save(10, state())
    path = run.tensors_path(checkpoint)
    run.store.put(path, run.store.read(path)[:-1])
    with pytest.raises(CorruptCheckpointError, match="committed were"):
        opened(run, checkpoint)["model"]["w"].read()
    run.store.delete(path)
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        opened(run, checkpoint)["model"]["w"].read()


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "tensor", "v": 3},
        {"$": "tensor", "v": -1},
        {"$": "tensor", "v": True},
        {"$": "tensor", "v": {"index": "0"}},
        {"$": "state_dict", "v": 5},
        {"$": "dict", "v": [[{"$": "tensor", "v": 0}]]},
    ],
)
def test_tree_that_was_never_written(run: MadeRun, tree: Any) -> None:
    """References to nothing, and nodes of another shape, are damage."""
    checkpoint = run.begin().save(10, state({**TREES, "model": tree}))
    with pytest.raises(CorruptCheckpointError):
        opened(run, checkpoint)


def test_two_paths_of_one_text(run: MadeRun) -> None:
    """Keys stay distinct."""
    tensor = {"$": "tensor", "v": 1}
    trees = {"model": {"a": {"b": tensor}, "a.b": {"$": "tensor", "v": 0}}}
    found = opened(run, run.begin().save(10, state(trees)))["model"]
    assert (bytes(found["a.b"].read()), bytes(found["a.b#2"].read())) == (b"moment", LARGE)


def test_failing_store_is_not_damage(run: MadeRun) -> None:
    """What cannot be looked at now may be later."""
    checkpoint = run.begin().save(10, state())
    failing = True

    def before(operation: str, path: str) -> None:
        if failing and path.endswith(".safetensors"):
            raise StoreError("no answer")

    found = open_checkpoint(HookedStore(run.store, before), run.layout, run.record(checkpoint))
    with pytest.raises(StoreError, match="no answer"):
        found["model"]["w"].read()
    failing = False
    assert bytes(found["model"]["w"].read()) == LARGE
