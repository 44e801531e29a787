"""A copy takes all that a checkpoint refers to and nothing else, verified, the record last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.made_ranks import commit_ranks, part_of_rank, plain, shared
from support.made_runs import HookedStore, MadeRun, State, Tensor, memory_store
from support.replicas import (
    check_replica,
    check_whole,
    closure,
    committed,
    contents,
    kept,
    refused,
    run_to_copy,
)
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.config import CheckpointConfig, RetentionConfig, StoreConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CkptTasksError,
    ConfigError,
    CorruptCheckpointError,
)
from ckpt_tasks.format.digest import CHUNK_BYTES
from ckpt_tasks.format.records import RowBlocks
from ckpt_tasks.replica import copy
from ckpt_tasks.replica.transfer import PIECE_BYTES
from ckpt_tasks.retention import collect, expire, expire_checkpoint, pin, plan_run, unpin
from ckpt_tasks.store import Store
from ckpt_tasks.tasks import reconcile, reconcile_all
from ckpt_tasks.testing import FaultyStore
from ckpt_tasks.testing.wrappers import CHANGES, OPERATIONS
from ckpt_tasks.types import CheckpointId


def test_a_copy_is_the_closure_and_nothing_else() -> None:
    """Files of earlier writes, indexes, records, attempts, pins, completion: byte by byte. What is
    given up stays behind; a repetition changes nothing; later, what is new comes.
    """
    run, target = run_to_copy(), FaultyStore(memory_store())
    wanted = kept(run)
    report = copy(run.store, target, run.name)
    pins = {info.path for info in run.store.list_objects(run.layout.marks("pins"))}
    assert contents(target).keys() == closure(run, wanted, attempts=2) | pins
    assert report.copied == [str(one) for one in wanted]
    assert [one.why for one in report.left] == ["quarantined: a test"]
    assert (report.there, report.damaged) == ([], [])
    assert report.files == len(target.list_objects(""))
    assert report.size == sum(info.size for info in target.list_objects(""))
    check_replica(run, target)
    there, here = view_run(target, run.name), view_run(run.store, run.name)
    assert there.newest == here.newest
    assert {c.id: c.standing for c in there.checkpoints} == {
        c.id: c.standing for c in here.checkpoints if CheckpointId.parse(c.id) in wanted
    }

    target.log.clear()
    again = copy(run.store, target, run.name)
    assert (again.copied, again.there, again.size) == ([], report.copied, 0)
    assert [operation for operation, _ in target.log] == ["abort_uploads"]

    attempt = run.begin("flow-run-3")
    new = attempt.save(70, state_of(7, frozen=2))
    run.complete(str(new))
    reads = FaultyStore(target, counted={"read_into"})
    assert copy(run.store, reads, run.name).copied == [str(new)]
    assert reads.log == []  # what the new one shares with the one before is not read again
    assert view_run(target, run.name).completed == view_run(run.store, run.name).completed
    marks = {run.layout.completed, *pins}
    assert contents(target).keys() == closure(run, [*wanted, new], attempts=3) | marks


def test_one_checkpoint() -> None:
    """With what it refers to and the attempts up to its own, on whose lineage it then lies."""
    run, target = run_to_copy(), memory_store()
    one = CheckpointId(30, 1, 3)  # a zombie in the source, and the newest of its attempt
    copy(run.store, target, run.name, checkpoint=one)
    assert contents(target).keys() == closure(run, [one], attempts=1)
    newest = view_run(target, run.name).newest
    assert newest is not None
    assert newest.id == str(one)
    copy(run.store, target, run.name)
    pins = {info.path for info in run.store.list_objects(run.layout.marks("pins"))}
    assert contents(target).keys() == closure(run, kept(run), attempts=2) | pins
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint step-00000001-a9-s9"):
        copy(run.store, target, run.name, checkpoint=CheckpointId(1, 9, 9))


def test_several_ranks_and_row_blocks() -> None:
    """Each rank's index and files, also those of blocks of rows, come; the state is the same."""
    run, target = MadeRun(), memory_store()
    weight = part_of_rank("model", "weight", bytes(range(12)), (3, 4))
    blocks = [
        Tensor("model", f"table[{n}:{n + 1}]", bytes([n]) * 8, extents=(1, 8), is_block=True)
        for n in range(2)
    ]
    states = [
        State(
            {"model": {"weight": plain(0), "table": plain(1)}},
            [weight, *blocks],
            row_blocks=[RowBlocks(key="table", position=1, count=2)],
        ),
        State({"model": {"weight": plain(0)}}),
    ]
    checkpoint = commit_ranks(run, states, [[], [shared(0, weight)]])
    copy(run.store, target, run.name, checkpoint=checkpoint)
    assert contents(target).keys() == closure(run, [checkpoint], attempts=1)
    assert any(".rows.safetensors" in path for path in contents(target))
    check_replica(run, target)
    source = state_digest(run.store, run.name, checkpoint)
    assert state_digest(target, run.name, checkpoint) == source


LARGE = PIECE_BYTES + CHUNK_BYTES + 5


@pytest.mark.parametrize(
    "position", [0, 9, 4096, PIECE_BYTES - 1, PIECE_BYTES, LARGE - 1, -1], ids=str
)
def test_a_flipped_byte_has_no_record(position: int) -> None:
    """Wherever in a file of several pieces; it is never whole in the target, others are copied."""
    run, target = MadeRun(), memory_store()
    attempt = run.begin()
    tensors = [Tensor("model", "large", bytes(LARGE)), Tensor("model", "small", b"1234567")]
    good = attempt.save(10)
    bad = attempt.save(20, State({"model": {}}, tensors))
    path = run.tensors_path(bad)
    run.damage(path, position=position)
    report = copy(run.store, target, run.name)
    assert ([one.checkpoint for one in report.damaged], committed(target, run)) == (
        [str(bad)],
        {good},
    )
    assert not target.exists(path)
    with pytest.raises(CorruptCheckpointError, match=path):
        copy(run.store, target, run.name, checkpoint=bad)
    run.damage(path, position=position)  # mended
    assert copy(run.store, target, run.name).copied == [str(bad)]
    check_replica(run, target)


@pytest.mark.parametrize("what", ["record", "index", "index gone", "once, on the way"])
def test_damage_beside_the_tensors(what: str) -> None:
    """A damaged record or index is told; a byte that only the transfer has changed is copied."""
    run, target = MadeRun(), memory_store()
    attempt = run.begin()
    good, bad = attempt.save(10), attempt.save(20)
    source: Any = run.store
    if what == "record":
        run.damage(run.layout.commit(bad), position=300)
    elif what == "index":
        run.damage(run.index_path(bad), position=300)
    elif what == "index gone":
        run.store.delete(run.index_path(bad))
    else:
        source = _FlipsOnce(run.store)
    report = copy(source, target, run.name)
    damaged = [] if what == "once, on the way" else [str(bad)]
    assert [one.checkpoint for one in report.damaged] == damaged
    assert committed(target, run) == {good, bad} - set(map(CheckpointId.parse, damaged))
    check_whole(target, run.name)


class _FlipsOnce(HookedStore):
    """Of all that is read into memory, the first byte is wrong the first time."""

    def __init__(self, store: Any) -> None:
        super().__init__(store, lambda operation, path: None)
        self._flips = True

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        super().read_into(path, start, stop, buffer)
        if self._flips:
            self._flips = False
            buffer[0] ^= 1


class KilledError(Exception):
    """The copying process is no more."""


def dies_at(store: Store, number: int) -> HookedStore:
    """A store whose user dies before its change of that number; what it had under way ends."""
    changes = itertools.count(1)

    def before(operation: str, path: str) -> None:
        if operation in CHANGES and next(changes) >= number:
            raise KilledError

    return HookedStore(store, before)


def test_killed_at_every_change_and_repeated() -> None:
    """Nothing half is ever a checkpoint. The repetition ends as if nothing had happened, and does
    not copy again what is there.
    """
    run, expected = run_to_copy(), memory_store()
    copy(run.store, expected, run.name)
    for number in itertools.count(1):
        target = memory_store()
        try:
            copy(run.store, dies_at(target, number), run.name)
        except KilledError:
            if target.exists(run.layout.run_record):
                check_replica(run, target)
        else:
            break
        before = contents(target)
        changes = FaultyStore(target)
        copy(run.store, changes, run.name)
        assert before.keys().isdisjoint(path for _, path in changes.log)
        assert contents(target).keys() == contents(expected).keys()
        check_replica(run, target)
    assert number > 20


def test_the_source_is_collected_at_any_moment() -> None:
    """Whatever the copy was reading: what it has committed is whole, and the rest is told."""
    outcomes = set()
    for number in range(1, 200, 5):
        run, target = run_to_copy(), memory_store()
        calls = 0

        def collect_once(operation: str, path: str) -> None:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023 - called in this round only
                run.expire_and_collect(latest=1)  # noqa: B023

        try:
            report = copy(HookedStore(run.store, collect_once), target, run.name)
        except CkptTasksError as error:
            report = None
            outcomes.add(type(error).__name__)
        if target.exists(run.layout.run_record):
            there = set(check_whole(target, run.name))
            if report is not None:
                assert there == set(map(CheckpointId.parse, report.copied))
                outcomes.add(len(report.left) > 1)
        if calls < number:
            break
    assert outcomes >= {True, False}
    assert number > 40


def test_two_copies_at_once() -> None:
    """Another copy runs between any two operations of one: both end well, as one would alone."""
    run, expected = run_to_copy(), memory_store()
    copy(run.store, expected, run.name)
    for number in range(1, 100, 7):
        store = memory_store()
        calls = 0

        def copy_too(operation: str, path: str) -> None:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023
                copy(run.store, store, run.name)  # noqa: B023

        copy(run.store, HookedStore(store, copy_too), run.name)
        assert contents(store).keys() == contents(expected).keys()
        check_replica(run, store)
        if calls < number:
            break


def test_a_damaged_copy_is_repaired() -> None:
    """One that no record names yet, at the next copy; one that is committed, when it is named. What
    takes its place is right for others that share the file, too.
    """
    run, target = RetainedRun(), memory_store()
    attempt = run.begin()
    first, second = attempt.save(10, state_of(1)), attempt.save(20, state_of(2))
    path = run.tensors_path(first)  # of which the second needs a part
    copy(run.store, target, run.name)
    replica = MadeRun(target, "other")
    replica.damage(path, position=-1)  # of the first alone
    target.delete(run.layout.commit(second))
    assert copy(run.store, target, run.name).copied == [str(second)]
    assert not verify_checkpoint(target, run.name, first).ok
    copy(run.store, target, run.name, checkpoint=first)
    check_whole(target, run.name)

    replica.damage(path, position=5000)  # of both
    target.delete(run.layout.commit(first))
    run.damage(path, position=-1)  # in the source, of the first alone
    copy(run.store, target, run.name, checkpoint=second)
    check_whole(target, run.name)


def test_what_a_copy_does_not_overwrite() -> None:
    """Another run of that name, the run itself, another record under an id; nor the same store."""
    run = MadeRun()
    checkpoint = run.begin().save(10)
    other = MadeRun()
    before = contents(other.store)
    with pytest.raises(ConfigError, match="is another run of that name"):
        copy(run.store, other.store, run.name)
    assert contents(other.store) == before
    with pytest.raises(ConfigError, match="name another store"):
        copy(run.store, run.store, run.name)
    byhand = memory_store()
    for path, data in contents(run.store).items():
        byhand.put(path, data)
    with pytest.raises(ConfigError, match="is this run itself"):
        copy(run.store, byhand, run.name)
    with pytest.raises(CheckpointNotFoundError, match="no run 'missing'"):
        copy(run.store, byhand, "missing")
    target = memory_store()
    copy(run.store, target, run.name)
    run.store.put(run.layout.commit(checkpoint), b"changed")
    report = copy(run.store, target, run.name)
    assert [one.checkpoint for one in report.damaged] == [str(checkpoint)]


def test_a_replica_is_read_only() -> None:
    """It is not claimed, pinned, expired, collected or reconciled, and each says what to do; of a
    store with others, it is left alone.
    """
    run, target = run_to_copy(), memory_store()
    copy(run.store, target, run.name)
    before = contents(target)
    replica = MadeRun.__new__(MadeRun)
    replica.store, replica.name, replica.layout = target, run.name, run.layout
    replica.identity = view_run(target, run.name).run
    checkpoint, rules = kept(run)[0], RetentionConfig(latest=1)
    config = CheckpointConfig(store=StoreConfig(url=target.url))
    for change in (
        replica.claim,
        lambda: pin(target, run.layout, checkpoint, why="", by=""),
        lambda: unpin(target, run.layout, checkpoint),
        lambda: plan_run(target, run.name, rules),
        lambda: expire(target, run.name, rules, by=""),
        lambda: expire_checkpoint(target, run.name, str(checkpoint), by=""),
        lambda: collect(target, run.name, grace=GRACE, by=""),
        lambda: reconcile(config, run.name),
    ):
        with refused():
            change()
    [report] = reconcile_all(config)
    assert (report.problem, report.changes) == (None, [])
    assert "left alone: a read-only replica" in report.notes[0]
    assert contents(target) == before


def test_a_source_is_only_read() -> None:
    """Who copies needs no permission to write there."""
    run = run_to_copy()
    source = FaultyStore(run.store, counted=OPERATIONS)
    copy(source, memory_store(), run.name)
    assert not {operation for operation, _ in source.log} & CHANGES
