"""An adopted replica is a run of its own: by one conditional step, whenever it is killed."""

from __future__ import annotations

import itertools

import pytest
from support.made_runs import HookedStore, MadeRun, memory_store
from support.replicas import check_whole, contents, refused, run_to_copy
from support.retained_runs import RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StaleAttemptError,
)
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.records import Ancestor
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.replica import adopt, copy
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing.memory_registry import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.wrappers import CHANGES
from ckpt_tasks.training.registration.publisher import Publisher


@pytest.fixture
def run() -> RetainedRun:
    return run_to_copy()


@pytest.fixture
def target(run: RetainedRun) -> Store:
    """A store with a replica of the run."""
    store = memory_store()
    copy(run.store, store, run.name)
    return store


def test_both_go_on_apart(run: RetainedRun, target: Store) -> None:
    """The adopted run resumes from the newest checkpoint under its own uid and the next number,
    keeps what it has inherited, and is retained; the original goes on as if nothing had happened.
    """
    before = view_run(target, run.name)
    identity = adopt(target, run.name)
    assert identity.uid != run.identity.uid
    assert identity.ancestors == [Ancestor(uid=run.identity.uid, attempts=2)]
    assert adopt(target, run.name) == identity
    adopted = RetainedRun(target)
    assert adopted.identity == identity
    attempt = adopted.begin("elsewhere")
    assert before.newest is not None
    assert (attempt.number, attempt.start) == (4, before.newest.id)
    assert [e.attempt for e in attempt.recovered.lineage.entries] == [4, 2, 1]
    own = attempt.save(70, state_of(7, frozen=2))
    assert adopted.record(own).uid == identity.uid
    original = run.begin("flow-run-3")
    assert original.start == before.newest.id
    assert run.record(original.save(70)).uid == run.identity.uid
    standings = {c.id: c.standing for c in before.checkpoints}
    after = view_run(target, run.name)
    assert {c.id: c.standing for c in after.checkpoints} == {**standings, str(own): "valid"}
    assert [a.resumed is not None for a in after.attempts] == [True, True, False, True]

    report = adopted.expire_and_collect(latest=1)
    pinned = next(c.id for c in before.checkpoints if c.pinned)
    assert [str(c) for c in adopted.left()] == [pinned, str(own)]
    assert report.refused is None
    adopted.check_whole()


def test_killed_at_every_change(run: RetainedRun, target: Store) -> None:
    """It is a replica that nobody trains, or a run; the repetition makes it one run, not two."""
    replica = contents(target)
    for number in itertools.count(1):
        store = memory_store()
        for path, data in replica.items():
            store.put(path, data)
        changes = itertools.count(1)

        def die(operation: str, path: str) -> None:
            if operation in CHANGES and next(changes) >= number:  # noqa: B023
                raise KeyError

        try:
            identity = adopt(HookedStore(store, die), run.name)
        except KeyError:
            assert read_run(store, run.layout).uid == run.identity.uid
            replicated = MadeRun(store)
            with refused():
                replicated.claim()
            claims = [a for a in view_run(store, run.name).attempts if a.number > 2]
            identity = adopt(store, run.name)
            assert all(a.claim is not None and a.claim.uid == identity.uid for a in claims)
        assert read_run(store, run.layout) == identity
        assert MadeRun(store).begin("elsewhere", takeover_after=60.0).number == 4
        check_whole(store, run.name)
        if number > 3:
            break


def test_two_adoptions_at_once(run: RetainedRun, target: Store) -> None:
    """Between any two operations of one, another runs: both tell the same identity, for good."""
    replica = contents(target)
    for number in range(1, 12):
        store, others = memory_store(), []
        for path, data in replica.items():
            store.put(path, data)
        calls = itertools.count(1)

        def adopt_too(operation: str, path: str) -> None:
            if next(calls) == number:  # noqa: B023
                others.append(adopt(store, run.name))  # noqa: B023
                MadeRun(store).begin("elsewhere").save(99)  # noqa: B023

        mine = adopt(HookedStore(store, adopt_too), run.name)
        assert others in ([mine], [])
        assert read_run(store, run.layout) == mine
        check_whole(store, run.name)


def test_adopted_while_it_is_copied_to(run: RetainedRun, target: Store) -> None:
    """Between any two operations of a copy that brings more: then the copy stops, and the run that
    was adopted is whole and trains on. No copy comes later.
    """
    later = run.begin("flow-run-3")
    later.save(70, state_of(7, frozen=2))
    later.save(80, state_of(8, frozen=3))
    replica, stopped = contents(target), 0
    for number in itertools.count(1, 2):
        store = memory_store()
        for path, data in replica.items():
            store.put(path, data)
        calls = 0

        def adopt_once(operation: str, path: str) -> None:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023
                adopt(store, run.name)  # noqa: B023

        try:
            copy(run.store, HookedStore(store, adopt_once), run.name)
        except (StaleAttemptError, ConfigError):  # in its midst; before it looked
            stopped += 1
        if calls < number:
            break
        with pytest.raises(ConfigError, match="was adopted: it goes its own way"):
            copy(run.store, store, run.name)
        adopted = MadeRun(store)
        adopted.begin("elsewhere").save(90)
        check_whole(store, run.name)
        [ancestor] = adopted.identity.ancestors or []
        for view in view_run(store, run.name).checkpoints:
            assert view.record is not None
            inherited = view.record.checkpoint.attempt <= ancestor.attempts
            assert (view.record.uid == run.identity.uid) == inherited
    assert stopped > 10


def test_a_copy_of_what_was_adopted(run: RetainedRun, target: Store) -> None:
    """It has the ancestors too, and is adopted in its turn. So has a copy of a copy the uid."""
    chained = memory_store()
    copy(target, chained, run.name)
    assert read_run(chained, run.layout).uid == run.identity.uid
    assert contents(chained).keys() == contents(target).keys()
    first = adopt(target, run.name)
    adopted = MadeRun(target)
    own = adopted.begin("elsewhere").save(70)
    third = memory_store()
    copy(target, third, run.name)
    check_whole(third, run.name)
    second = adopt(third, run.name)
    assert second.ancestors == [
        Ancestor(uid=run.identity.uid, attempts=2),
        Ancestor(uid=first.uid, attempts=4),
    ]
    assert MadeRun(third).begin("third").start == str(own)
    check_whole(third, run.name)


def test_what_is_inherited_ends_with_the_adoption(run: RetainedRun, target: Store) -> None:
    """A later record of the ancestor, copied by hand, is not the run's: it went on elsewhere."""
    adopt(target, run.name)
    adopted = MadeRun(target)
    adopted.begin("elsewhere")
    foreign = run.begin("flow-run-3").save(70)
    path = run.layout.commit(foreign)
    target.put(path, run.store.read(path))
    with pytest.raises(CorruptCheckpointError, match=f"not of {adopted.identity.uid}"):
        read_commit(target, run.layout, foreign, run=adopted.identity)


def test_what_cannot_be_adopted(run: RetainedRun) -> None:
    """A run that never was a replica; a replica without checkpoints."""
    with pytest.raises(ConfigError, match="is no replica"):
        adopt(run.store, run.name)
    empty, target = MadeRun(name="empty"), memory_store()
    empty.begin()
    copy(empty.store, target, "empty")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of run 'empty'"):
        adopt(target, "empty")
    with pytest.raises(CheckpointNotFoundError, match="no run 'missing'"):
        adopt(target, "missing")


def test_a_run_of_its_own_in_the_registry(run: RetainedRun, target: Store) -> None:
    """With all checkpoints that it has inherited; the original's stays as it is."""
    memory = RegistryMemory()
    adopt(target, run.name)
    runs = [run, MadeRun(target)]
    ids = []
    for number, made in enumerate(runs):
        attempt = made.begin(f"invocation-{number}")
        registry = MemoryRegistry(memory)
        publisher = Publisher(
            made.store,
            made.layout,
            Fence(made.store, made.layout, attempt.number),
            registry,
            RegistryConfig(),
            RunDescription(
                run=made.name,
                uid=made.identity.uid,
                store_url=made.store.url,
                hyperparameters={},
            ),
            lambda event: None,
        )
        publisher.publish()
        ids.append(
            (set(registry.registered()), made.store.read(made.layout.registry_ids("memory")))
        )
    assert ids[0][0] == ids[1][0] != set()
    assert ids[0][1] != ids[1][1]
