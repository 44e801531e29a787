"""The commit between its two fence checks, and the `Checkpointer` that makes it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from support.made_runs import (
    HookedStore,
    MadeAttempt,
    MadeRun,
    State,
    Tensor,
    memory_store,
    save_request,
    small_state,
    write_state,
)

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.commit import commit, new_write_id
from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_index
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, StaleAttemptError, StoreError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import MarkKind
from ckpt_tasks.format.records import MAX_INDEX_BYTES, CommitRecord, Index
from ckpt_tasks.testing import Fault, FaultyStore
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.types import CheckpointId, Position


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


def committed(run: MadeRun) -> list[str]:
    return [str(checkpoint) for checkpoint in list_checkpoints(run.store, run.layout)]


def incremental(run: MadeRun, base: CheckpointId) -> tuple[CommitRecord, Index]:
    """A written, uncommitted checkpoint whose tensor's bytes are those of `base`."""
    earlier = run.record(base)
    index = read_index(run.store, run.layout, earlier.indexes[0])
    checkpoint = CheckpointId(base.step + 1, base.attempt, base.sequence + 1)
    record = msgspec.structs.replace(
        earlier,
        id=str(checkpoint),
        write_id=new_write_id(checkpoint.attempt, checkpoint.sequence, "ff"),
        position=Position(step=checkpoint.step, phase="epoch_done"),
    )
    return record, index


def test_saved_checkpoint_is_whole(run: MadeRun) -> None:
    """What `save` returns is the record that stands in the store, and loads."""
    attempt = run.begin()
    record = attempt.checkpointer.save(small_state(3), save_request(10, metrics={"loss": 0.5}))
    assert run.record(record.checkpoint) == record
    assert (record.id, record.metrics) == ("step-00000010-a1-s1", {"loss": 0.5})
    assert record.uid == run.identity.uid
    assert [e.attempt for e in record.lineage] == [1]
    assert [bytes(t) for t in load_checkpoint(run.store, run.layout, record).tensors.values()] == [
        b"\x03"
    ]


def test_size_counts_every_file(run: MadeRun) -> None:
    """A checkpoint's size is that of its tensor files and its index."""
    checkpoint = run.begin().save(10)
    stored = sum(info.size for info in run.store.list_objects(run.layout.data))
    assert run.record(checkpoint).size == stored


def test_sequence_counts_saves(run: MadeRun) -> None:
    """Ids differ also at one step, and each attempt counts from 1."""
    first = run.begin()
    assert [str(first.save(10)), str(first.save(10))] == [
        "step-00000010-a1-s1",
        "step-00000010-a1-s2",
    ]
    assert str(run.begin().save(11)) == "step-00000011-a2-s1"


def test_sequence_is_never_used_again(run: MadeRun) -> None:
    """A save that failed may still land: its number is spent."""
    faults = [Fault(at=1)]
    store = FaultyStore(run.store, faults, counted={"write"})
    attempt = run.begin(through=store)
    with pytest.raises(StoreError):
        attempt.save(10)
    assert attempt.checkpointer.next_id(Position(step=10)).sequence == 2
    assert str(attempt.save(10)) == "step-00000010-a1-s2"
    assert committed(run) == ["step-00000010-a1-s2"]


def test_data_lies_there_before_the_record(run: MadeRun) -> None:
    """When the record is created, every object that it names is in the store."""
    seen: list[bool] = []

    def before(operation: Operation, path: str) -> None:
        if operation == "create" and "/commits/" in path:
            seen.append(len(run.store.list_objects(run.layout.data)) == 2)

    run.begin(through=HookedStore(run.store, before)).save(10)
    assert seen == [True]


def test_stale_before_the_commit(run: MadeRun) -> None:
    """A later attempt's claim keeps the record from being made."""
    attempt = run.begin()
    run.claim()
    with pytest.raises(StaleAttemptError, match="attempt 2 has been claimed"):
        attempt.save(10)
    assert committed(run) == []


def after(operation: Operation, part: str, do: Callable[[], object]) -> Callable[..., None]:
    """A hook that acts at the first operation behind the one told."""
    state = {"armed": False, "done": False}

    def before(asked: Operation, path: str) -> None:
        if state["armed"] and not state["done"]:
            state["done"] = True
            do()
        state["armed"] = state["armed"] or (asked == operation and part in path)

    return before


def test_stale_after_the_commit(run: MadeRun) -> None:
    """Claimed between the record and the second look: the record stands, and this attempt ends."""
    store = HookedStore(run.store, after("create", "/commits/", run.claim))
    attempt = run.begin(through=store)
    with pytest.raises(StaleAttemptError):
        attempt.save(10)
    assert committed(run) == ["step-00000010-a1-s1"]
    assert run.begin().start == "step-00000010-a1-s1"


def test_unreachable_fence_after_the_commit(run: MadeRun) -> None:
    """The checkpoint exists; that the fence could not be asked again does not undo it."""
    asked: list[str] = []

    def before(operation: Operation, path: str) -> None:
        if operation == "exists":
            asked.append(path)
            if len(asked) == 2:
                raise StoreError("no answer")

    attempt = run.begin(through=HookedStore(run.store, lambda *_: None))
    attempt = made(run, attempt, HookedStore(run.store, before))
    assert str(attempt.save(10)) == committed(run)[0]
    assert len(asked) == 2


def made(run: MadeRun, attempt: MadeAttempt, store: HookedStore) -> MadeAttempt:
    """The same attempt, saving through another store."""
    checkpointer = run.checkpointer(store, attempt.attempt, attempt.recovered)
    return MadeAttempt(attempt.attempt, attempt.recovered, checkpointer)


def test_unreachable_fence_before_the_commit(run: MadeRun) -> None:
    """Without an answer nothing is committed."""
    store = FaultyStore(run.store, [], counted={"exists"})
    attempt = run.begin(through=store)
    store.faults.append(Fault(at=store.count + 1))
    with pytest.raises(StoreError):
        attempt.save(10)
    assert committed(run) == []


def test_lost_answer(run: MadeRun) -> None:
    """A create that landed without an answer is found to be this attempt's own."""
    store = FaultyStore(run.store, [], counted={"create"})
    attempt = run.begin(through=store)
    store.faults.append(Fault(at=store.count + 1, when="after"))
    checkpoint = attempt.save(10)
    assert committed(run) == [str(checkpoint)]
    assert run.begin().start == str(checkpoint)


def test_another_process_of_the_same_attempt(run: MadeRun) -> None:
    """Somebody else's record under this id ends the attempt, and stands."""
    attempt = run.begin()
    other = made(run, attempt, HookedStore(run.store, lambda *_: None))
    winner = run.record(other.save(10))
    with pytest.raises(StaleAttemptError, match="committed by another process"):
        attempt.save(10)
    assert run.record(winner.checkpoint) == winner


def test_record_too_large(run: MadeRun) -> None:
    """A record beyond 64 KB is a mistake to mend at once, not to retry; size and cause are told."""
    attempt = run.begin()
    metrics = {f"metric-{n:05d}": 0.5 for n in range(4000)}
    with pytest.raises(ConfigError, match=r"takes \d+ bytes, more than 65536; log fewer"):
        attempt.save(10, metrics=metrics)
    assert committed(run) == []


def test_index_too_large(run: MadeRun) -> None:
    """What no reader would take is not committed, and leaves nothing; what is to blame is named."""
    attempt = run.begin()
    state = State({"model": {}, "history": "x" * MAX_INDEX_BYTES}, [Tensor("model", "w", b"abcd")])
    with pytest.raises(ConfigError, match=r"'history' takes most, \d+ bytes: keep many numbers in"):
        attempt.save(10, state)
    assert committed(run) == []
    assert run.store.list_objects(run.layout.data) == []


def test_reference_to_bytes_that_stand(run: MadeRun) -> None:
    """A checkpoint may name the file of an earlier write."""
    base = run.begin().save(10)
    record, index = incremental(run, base)
    commit(run.store, run.layout, Fence(run.store, run.layout, 1), record, [index])
    assert record.id in committed(run)


@pytest.mark.parametrize("kind", ["expired", "collecting", "quarantined"])
def test_reference_to_bytes_that_are_marked(run: MadeRun, kind: MarkKind) -> None:
    """Bytes that may be removed, or are damaged, are in no new checkpoint."""
    base = run.begin().save(10)
    record, index = incremental(run, base)
    mark(run.store, run.layout, kind, base, why="a test", by="a test")
    with pytest.raises(StoreError, match="is marked as expired or damaged"):
        commit(run.store, run.layout, Fence(run.store, run.layout, 1), record, [index])
    assert committed(run) == [str(base)]


def test_reference_to_pinned_bytes(run: MadeRun) -> None:
    """A pin keeps bytes, so they may be named."""
    base = run.begin().save(10)
    record, index = incremental(run, base)
    mark(run.store, run.layout, "pins", base, why="a test", by="a test")
    commit(run.store, run.layout, Fence(run.store, run.layout, 1), record, [index])
    assert record.id in committed(run)


def test_reference_to_missing_bytes(run: MadeRun) -> None:
    """A file that is gone is noticed before the commit."""
    base = run.begin().save(10)
    record, index = incremental(run, base)
    run.store.delete(run.tensors_path(base))
    with pytest.raises(StoreError, match="is gone"):
        commit(run.store, run.layout, Fence(run.store, run.layout, 1), record, [index])
    assert committed(run) == [str(base)]


def test_missing_checkpoint_is_not_found(run: MadeRun) -> None:
    """An id without a commit record is no checkpoint, whatever data lies there."""
    write_state(run.store, run.layout, small_state(), write_id="a0001-s0001-ff")
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint step-00000010-a1-s1"):
        run.record(CheckpointId(10, 1, 1))


def test_two_runs_in_one_store() -> None:
    """Each has its own checkpoints."""
    store = memory_store()
    one, two = MadeRun(store, "one"), MadeRun(store, "two")
    one.begin().save(10)
    two.begin().save(20)
    assert committed(one) == ["step-00000010-a1-s1"]
    assert committed(two) == ["step-00000020-a1-s1"]
