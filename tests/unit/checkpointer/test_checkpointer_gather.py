"""Gathering the indexes of all ranks: all there and of one mind, or nothing to commit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from support.made_runs import State, Tensor, memory_store, write_state

from ckpt_tasks.checkpointer.gather import GatheredRanks, gather_indexes
from ckpt_tasks.checkpointer.reader import check_files, read_index
from ckpt_tasks.checkpointer.writer import WrittenRank
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.digest import digest, digest_of_chunks
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import SharedTensor
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore

LAYOUT = RunLayout("digits")
WRITE_ID = "a0001-s0001-0123456789ab"


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path))


def write(store: Store, rank: int, world_size: int = 2, **how: Any) -> WrittenRank:
    weight = Tensor("model", "weight", bytes([7]))
    state = State({"model": {}}, [] if "shared" in how else [weight])
    return write_state(
        store, LAYOUT, state, write_id=WRITE_ID, rank=rank, world_size=world_size, **how
    )


def gather(store: Store, own: WrittenRank, world_size: int = 2, **how: Any) -> GatheredRanks:
    clock = FakeClock()
    how = {"seconds": 60.0, "clock": clock, "sleep": clock.sleep, **how}
    return gather_indexes(store, LAYOUT, WRITE_ID, world_size, own.ref, **how)


def shared(of: int, value: int = 7) -> list[SharedTensor]:
    """The weight that rank `of` has written, as a rank that holds `value` names it."""
    own = digest_of_chunks([digest(bytes([value]))])
    return [SharedTensor(position=0, rank=of, item="model", key="weight", digest=own)]


def test_all_ranks_are_named_in_order(store: Store) -> None:
    """References, indexes and sizes of all ranks, whoever was first."""
    third, second = write(store, 2, 3, nonfinite=["model.a"]), write(store, 1, 3)
    own = write(store, 0, 3)
    gathered = gather(store, own, 3)
    assert gathered.refs == [own.ref, second.ref, third.ref]
    assert gathered.indexes == [own.index, second.index, third.index]
    assert gathered.size == own.size + second.size + third.size
    assert gathered.nonfinite == ["model.a"]


def test_a_slow_rank_is_waited_for(store: Store) -> None:
    """The index of a rank that comes later is found when it is there."""
    own = write(store, 0)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            write(store, 1)

    assert [ref.rank for ref in gather(store, own, sleep=sleep).refs] == [0, 1]
    assert len(pauses) == 3


def test_missing_ranks_are_named_when_time_is_up(store: Store) -> None:
    """After the time that was given: those that are missing, and only those."""
    own, clock = write(store, 0, 4), FakeClock()
    write(store, 2, 4)
    with pytest.raises(StoreError, match=r"the part of rank 1, 3 is missing \(not there after 60"):
        gather(store, own, 4, clock=clock, sleep=clock.sleep)
    assert clock() >= 60


def test_a_rank_known_to_have_failed_is_not_waited_for(store: Store) -> None:
    """What a rank said about its failure ends the wait, and stands in the error."""
    own, clock = write(store, 0), FakeClock()
    with pytest.raises(StoreError, match=r"rank 1 is missing \(rank 1: disk full\)"):
        gather(store, own, failure=lambda: "rank 1: disk full", clock=clock, sleep=clock.sleep)
    assert clock() == 0


def test_a_part_that_came_before_the_failure_was_told_counts(store: Store) -> None:
    """The last that a rank does before it ends may be its part."""
    own = write(store, 0)

    def failure() -> str:
        write(store, 1)
        return "no other rank runs any more"

    assert [ref.rank for ref in gather(store, own, failure=failure).refs] == [0, 1]


@pytest.mark.parametrize("when", ["after", "late"])
def test_a_part_whose_rank_knows_nothing_of_it_is_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: Literal["after", "late"]
) -> None:
    """The create of its index was answered by nothing but errors, and took effect, perhaps after
    the rank had given up: what rank 0 finds, and commits, is all there.
    """
    monkeypatch.setitem(create_once.__kwdefaults__, "sleep", lambda seconds: None)
    faults = [Fault(at=1, when=when, delay=99), Fault(at=2, times=20)]
    faulty = FaultyStore(store, faults, counted={"create", "read"})
    with pytest.raises(StoreError):
        write(faulty, 1)
    faulty.land()
    gathered = gather(store, write(store, 0))
    for ref in gathered.refs:
        assert len(list(check_files(store, LAYOUT, read_index(store, LAYOUT, ref)))) == 1


@pytest.mark.parametrize("world_size", [3, 1000])
def test_an_index_of_another_world_is_refused(store: Store, world_size: int) -> None:
    """One that was written by a rank of a larger world makes no checkpoint here."""
    own = write(store, 0)
    write(store, 1, world_size)
    with pytest.raises(StoreError, match=f"rank 1 of {world_size}, where that of rank 1 of 2"):
        gather(store, own)


def test_a_damaged_index_is_refused(store: Store) -> None:
    """A checksum that does not match is found before the commit."""
    own, other = write(store, 0), write(store, 1)
    path = LAYOUT.in_run(other.ref.path)
    store.put(path, store.read(path).replace(b'"rank":1', b'"rank":0'))
    with pytest.raises(StoreError, match="cannot be read"):
        gather(store, own)


def test_own_index_must_be_the_one_just_written(store: Store) -> None:
    """Another process that executes the same attempt has written over it."""
    own = write(store, 0)
    write(store, 1)
    store.put(LAYOUT.in_run(own.ref.path), encode(msgspec.structs.replace(own.index, items={})))
    with pytest.raises(StoreError, match="not what rank 0 has just written"):
        gather(store, own)


def test_a_shared_tensor_is_what_its_writer_wrote(store: Store) -> None:
    """One rank writes for two, whose values are the same."""
    own = write(store, 0)
    write(store, 1, shared=shared(0))
    assert gather(store, own).indexes[1].shared == shared(0)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: shared(0, value=8), id="other values"),
        pytest.param(lambda: [msgspec.structs.replace(shared(0)[0], key="bias")], id="no such"),
        pytest.param(lambda: [msgspec.structs.replace(shared(0)[0], item="ema")], id="other item"),
    ],
)
def test_ranks_of_different_minds_commit_nothing(
    store: Store, wrong: Callable[[], list[SharedTensor]]
) -> None:
    """A tensor that one rank left to another, which wrote none such, would be lost."""
    own = write(store, 0)
    write(store, 1, shared=wrong())
    with pytest.raises(StoreError, match="values differ where one was to write for all"):
        gather(store, own)


def test_ranks_that_left_a_tensor_to_each_other_commit_nothing(store: Store) -> None:
    """Nobody has written it."""
    own = write(store, 0, shared=shared(1))
    write(store, 1, shared=shared(0))
    with pytest.raises(StoreError, match=r"of rank 0, model.*of rank 1"):
        gather(store, own)


def test_threads_gather_while_others_write(tmp_path: Path) -> None:
    """With real time, files and fsync: the gathering rank sees no half of an index."""
    store = open_store(str(tmp_path))
    own = write(store, 0, 4)
    others = [threading.Thread(target=write, args=(store, rank, 4)) for rank in (3, 2, 1)]
    for thread in others:
        thread.start()
    gathered = gather_indexes(store, LAYOUT, WRITE_ID, 4, own.ref, seconds=60)
    for thread in others:
        thread.join()
    assert [index.rank for index in gathered.indexes] == [0, 1, 2, 3]
