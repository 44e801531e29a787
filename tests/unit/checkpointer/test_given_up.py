"""What is left of saves that some rank could not make: removed, but for what a commit may name."""

from __future__ import annotations

from support.made_runs import memory_store

from ckpt_tasks.checkpointer.given_up import GivenUpWrites
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import FileEntry, Index
from ckpt_tasks.store import Store
from ckpt_tasks.testing import Fault, FaultyStore

LAYOUT = RunLayout("digits")
FIRST, SECOND = "a0001-s0001-0123456789ab", "a0001-s0002-0123456789ab"


def write(store: Store, write_id: str, *names: str) -> list[str]:
    """As a rank does; the paths in the run's folder."""
    paths = [f"{LAYOUT.write_folder_in_run(write_id)}/{name}" for name in names]
    for path in paths:
        store.put(LAYOUT.in_run(path), b"x")
    return paths


def left(store: Store) -> list[str]:
    return sorted(info.path for info in store.list_objects(LAYOUT.data))


def naming(path: str) -> Index:
    file = FileEntry(path=path, size=1, header_size=1, header_digest="")
    return Index(rank=1, world_size=2, files=[file], tensors=[], items={}, metrics=[])


def test_it_is_removed_when_the_next_save_has_ended_and_does_not_name_it() -> None:
    """Which fails, too, or is committed; also what has come late."""
    store = memory_store()
    given_up = GivenUpWrites(store, LAYOUT)
    write(store, FIRST, "model.rank0001.safetensors", "rank0001.index.json")
    given_up.add(FIRST)
    write(store, FIRST, "model.rank0002.safetensors")
    assert len(left(store)) == 3
    named, _ = write(store, SECOND, "model.rank0001.safetensors", "rank0001.index.json")
    given_up.add(SECOND)
    assert [path for path in left(store) if FIRST in path] == []
    write(store, FIRST, "model.rank0003.safetensors")
    given_up.settle([naming(named)])
    assert left(store) == [LAYOUT.in_run(named)]
    given_up.settle([])
    assert left(store) == [LAYOUT.in_run(named)]


def test_nothing_is_removed_that_a_commit_without_an_answer_may_name() -> None:
    """A later write may have become a checkpoint, and refer to it."""
    store = memory_store()
    given_up = GivenUpWrites(store, LAYOUT)
    write(store, FIRST, "model.rank0001.safetensors")
    given_up.add(FIRST)
    given_up.leave()
    given_up.add(SECOND)
    assert len(left(store)) == 1


def test_a_store_that_fails_leaves_it_to_a_collection() -> None:
    """The save has failed, which is what is told."""
    store = FaultyStore(memory_store(), [Fault(at=1)], counted={"list_objects"})
    write(store, FIRST, "model.rank0001.safetensors")
    given_up = GivenUpWrites(store, LAYOUT)
    given_up.add(FIRST)
    given_up.settle([])
    assert len(left(store.store)) == 1
