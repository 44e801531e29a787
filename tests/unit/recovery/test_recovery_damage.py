"""What recovery does when it meets damage, failing storage, or a later attempt."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest
from support.made_ranks import commit_ranks, plain
from support.made_runs import HookedStore, MadeRun, State, Tensor, small_state

from ckpt_tasks.checkpointer.marks import mark, marked, read_mark
from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StaleAttemptError,
    StoreError,
    UnsupportedFormatError,
)
from ckpt_tasks.events import CheckpointQuarantined, Event
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.digest import digest
from ckpt_tasks.recovery.recover import RecoveryPreview, preview_recovery, recover
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


def preview(run: MadeRun, **asked: str) -> RecoveryPreview:
    attempts = read_attempts(run.store, run.layout)
    return preview_recovery(run.store, run.layout, run.identity, attempts, **asked)


Damage = Callable[[MadeRun, CheckpointId], None]

DAMAGES: dict[str, Damage] = {
    "commit record": lambda run, c: run.damage(run.layout.commit(c), position=40),
    "index": lambda run, c: run.damage(run.index_path(c), position=40),
    "header": lambda run, c: run.damage(run.tensors_path(c), position=40),
    "tensor": lambda run, c: run.damage(run.tensors_path(c)),
    "truncated": lambda run, c: run.store.put(
        run.tensors_path(c), run.store.read(run.tensors_path(c))[:-1]
    ),
    "file missing": lambda run, c: run.store.delete(run.tensors_path(c)),
    "index missing": lambda run, c: run.store.delete(run.index_path(c)),
    "another run's": lambda run, c: run.store.put(
        run.layout.commit(c), encode(msgspec.structs.replace(run.record(c), uid="0" * 32))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_falls_back(run: MadeRun, damage: Damage) -> None:
    """It is quarantined, reported as an event and in the record, and the next older is taken."""
    first = run.begin()
    older = first.save(10)
    damaged = first.save(20)
    damage(run, damaged)
    events: list[Event] = []
    second = run.begin(on_event=events.append)
    assert second.start == str(older)
    assert marked(run.store, run.layout)["quarantined"] == {damaged}
    (event,) = events
    assert isinstance(event, CheckpointQuarantined)
    assert event.checkpoint == str(damaged)
    (passed,) = second.recovered.resumed.passed_over
    assert (passed.checkpoint, passed.why) == (str(damaged), event.why)


def test_damage_of_any_rank_is_found(run: MadeRun) -> None:
    """One process restores what two have saved, and takes nothing from the second's file: it is
    read all the same.
    """
    older = run.begin().save(5)
    tensors = [Tensor("model", "weight", bytes([rank])) for rank in range(2)]
    damaged = commit_ranks(run, [State({"model": plain(0)}, [tensor]) for tensor in tensors])
    ref = run.record(damaged).indexes[1]
    run.damage(run.layout.in_run(read_index(run.store, run.layout, ref).files[0].path))
    assert run.begin().start == str(older)
    assert marked(run.store, run.layout)["quarantined"] == {damaged}


@pytest.mark.parametrize("until", ["its record is gone", "its bytes are gone"])
def test_what_is_collected_meanwhile_is_no_damage(run: MadeRun, until: str) -> None:
    """A collection that comes between the listing and the reading: nobody is to look into it."""
    first = run.begin()
    older, collected = first.save(10), first.save(20)
    tensors = run.tensors_path(collected)

    def before(operation: Operation, path: str) -> None:
        if operation == "read" and path == run.layout.commit(collected):
            mark(run.store, run.layout, "collecting", collected, why="a test", by="a test")
            run.store.delete(tensors)
            if until == "its record is gone":
                run.store.delete(run.layout.commit(collected))
                run.store.delete(run.layout.mark("collecting", collected))

    events: list[Event] = []
    second = run.begin(through=HookedStore(run.store, before), on_event=events.append)
    assert second.start == str(older)
    assert events == []
    assert marked(run.store, run.layout)["quarantined"] == set()
    assert [p.checkpoint for p in second.recovered.resumed.passed_over] == [str(collected)]


def test_quarantine_says_who_found_what(run: MadeRun) -> None:
    """The mark names the attempt and the damage."""
    first = run.begin()
    first.save(10)
    damaged = first.save(20)
    run.damage(run.tensors_path(damaged))
    run.begin()
    found = read_mark(run.store, run.layout, "quarantined", damaged)
    assert found is not None
    assert found.by == "attempt 2"
    assert "chunk 0 of tensor 'weight'" in found.why


def test_all_damaged(run: MadeRun) -> None:
    """Every one is quarantined, and the run is not started again from step 0."""
    first = run.begin()
    checkpoints = {first.save(10), first.save(20)}
    for checkpoint in checkpoints:
        run.damage(run.tensors_path(checkpoint))
    with pytest.raises(CheckpointNotFoundError, match="none of the 2 checkpoints"):
        run.begin()
    assert marked(run.store, run.layout)["quarantined"] == checkpoints
    assert not run.store.exists(run.layout.resumed(2))


def test_damaged_one_asked_for_by_id(run: MadeRun) -> None:
    """No other one is put in its place: the error tells that it is damaged."""
    first = run.begin()
    first.save(10)
    asked = first.save(20)
    run.damage(run.tensors_path(asked))
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        run.begin("flow-run-2", resume=str(asked))
    assert marked(run.store, run.layout)["quarantined"] == {asked}


def test_all_unhealthy(run: MadeRun) -> None:
    """They are restorable, but no retry may go on from them: outcome 4, marked as nothing."""
    run.begin().save(10, nonfinite=["model.weight"])
    with pytest.raises(CheckpointNotFoundError, match=r"unhealthy: NaN .* in model\.weight"):
        run.begin()
    assert marked(run.store, run.layout)["quarantined"] == set()


def test_deadly_checkpoint_is_the_last_resort(run: MadeRun) -> None:
    """Where every older one is damaged, the one that attempts died from is still restorable."""
    first = run.begin()
    older, deadly = first.save(10), first.save(20)
    for _ in range(3):
        run.fail(run.begin().number, step=21)
    run.damage(run.tensors_path(older))
    assert preview(run).checkpoint == str(deadly)
    fallback = run.begin()
    assert fallback.start == str(deadly)
    assert [p.checkpoint for p in fallback.recovered.resumed.passed_over] == [str(older)]


class FlippedOnce(WrapperStore):
    """The first read of one object gives a wrong byte, as a bad transfer does."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__(store)
        self._path = path
        self.flipped = 0

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        data = super().read(path, limit=limit)
        if path == self._path and not self.flipped:
            self.flipped += 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        super().read_into(path, start, stop, buffer)
        if path == self._path and not self.flipped:
            self.flipped += 1
            buffer[stop - start - 1] ^= 1


@pytest.mark.parametrize("kind", ["tensors", "index", "commit"])
def test_bad_transfer_is_not_damage(run: MadeRun, kind: str) -> None:
    """What is wrong at the first reading and right at the second is not quarantined."""
    newest = run.begin().save(20)
    path = {
        "tensors": run.tensors_path(newest),
        "index": run.index_path(newest),
        "commit": run.layout.commit(newest),
    }[kind]
    store = FlippedOnce(run.store, path)
    events: list[Event] = []
    second = run.begin(through=store, on_event=events.append)
    assert store.flipped == 1
    assert second.start == str(newest)
    assert events == []
    assert marked(run.store, run.layout)["quarantined"] == set()


def failing(operation: Operation, part: str) -> Callable[[Operation, str], None]:
    """A hook that fails an operation on paths that contain `part`."""

    def before(asked: Operation, path: str) -> None:
        if asked == operation and part in path:
            raise StoreError(f"no answer to {asked} of {path}")

    return before


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("read", "/commits/"),
        ("size", ".safetensors"),
        ("read_into", ".safetensors"),
        ("list_objects", "/commits/"),
        ("list_objects", "/marks/"),
    ],
)
def test_failing_storage_says_nothing_about_a_checkpoint(
    run: MadeRun, operation: Operation, part: str
) -> None:
    """A store that does not answer ends the attempt, and quarantines nothing."""
    run.begin().save(10)
    store = HookedStore(run.store, failing(operation, part))
    with pytest.raises(StoreError, match="no answer"):
        run.begin(through=store)
    assert marked(run.store, run.layout)["quarantined"] == set()
    assert not run.store.exists(run.layout.resumed(2))


def test_later_format_is_not_quarantined(run: MadeRun) -> None:
    """A checkpoint of a newer version is nobody's damage: the error says to upgrade."""
    checkpoint = run.begin().save(10)
    newer = msgspec.structs.replace(run.record(checkpoint), format=2)
    body = msgspec.json.encode(newer).removesuffix(b"}")
    seal = b',\n "checksum": "%s"\n}\n' % digest(body).encode("ascii")
    run.store.put(run.layout.commit(checkpoint), body + seal)
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        run.begin()
    assert marked(run.store, run.layout)["quarantined"] == set()


def test_stale_attempt_marks_nothing(run: MadeRun) -> None:
    """What an attempt that lost its run cannot read may have been removed since."""
    first = run.begin()
    first.save(10)
    damaged = first.save(20)
    run.damage(run.tensors_path(damaged))
    attempt = run.claim()
    run.claim()
    with pytest.raises(StaleAttemptError):
        recover(run.store, run.layout, run.identity, attempt)
    assert marked(run.store, run.layout)["quarantined"] == set()


def test_stale_attempt_does_not_record_its_start(run: MadeRun) -> None:
    """It never trained, so it leaves the lineage as it was."""
    run.begin().save(10)
    attempt = run.claim()
    run.claim()
    with pytest.raises(StaleAttemptError):
        recover(run.store, run.layout, run.identity, attempt)
    assert not run.store.exists(run.layout.resumed(attempt.number))


def test_attempt_executed_twice(run: MadeRun) -> None:
    """Two processes under one number: the one that finds another's record stops."""
    run.begin().save(10)
    attempt = run.claim()
    recover(run.store, run.layout, run.identity, attempt)
    time.sleep(0.002)  # records of one millisecond are equal, and so taken for one's own
    with pytest.raises(StaleAttemptError, match="executed by another process too"):
        recover(run.store, run.layout, run.identity, attempt)


def test_recovered_bytes_are_the_saved_ones(run: MadeRun) -> None:
    """The checkpoint in memory holds the trees and tensors that were saved."""
    run.begin().save(10, small_state(7))
    loaded = run.begin().recovered.checkpoint
    assert loaded is not None
    assert loaded.trees == {"model": {}, "loop": {"best": 7}}
    assert {p: bytes(tensor) for p, tensor in loaded.tensors.items()} == {0: b"\x07"}


def test_preview_tells_what_recover_would_do(run: MadeRun) -> None:
    """It finds damage and falls back, and changes no object of the store."""
    first = run.begin()
    older = first.save(10)
    first.save(20, nonfinite=["model.weight"])
    damaged = first.save(30)
    run.damage(run.tensors_path(damaged))
    before = run.contents()
    found = preview(run)
    assert run.contents() == before
    assert (found.checkpoint, found.step) == (str(older), 10)
    second = run.begin()
    assert second.start == found.checkpoint
    assert [p.checkpoint for p in second.recovered.resumed.passed_over] == [
        p.checkpoint for p in found.passed_over
    ]


def test_preview_of_an_empty_run(run: MadeRun) -> None:
    """A run without a checkpoint would start at step 0."""
    found = preview(run)
    assert (found.checkpoint, found.step, found.passed_over) == (None, 0, [])


def test_preview_of_nothing_restorable(run: MadeRun) -> None:
    """The preview fails as the attempt would."""
    checkpoint = run.begin().save(10)
    run.damage(run.tensors_path(checkpoint))
    before = run.contents()
    with pytest.raises(CheckpointNotFoundError, match="none of the 1 checkpoints"):
        preview(run)
    assert run.contents() == before


def test_preview_of_what_was_asked_for(run: MadeRun) -> None:
    """It knows whether a request still binds its invocation."""
    first = run.begin()
    asked = first.save(10)
    newest = first.save(20)
    assert preview(run, resume=str(asked), invocation="flow-run-2").checkpoint == str(asked)
    assert preview(run, resume=str(asked), invocation="flow-run-1").checkpoint == str(newest)
    assert preview(run, resume="fresh", invocation="flow-run-2").checkpoint is None
