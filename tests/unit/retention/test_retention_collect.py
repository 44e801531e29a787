"""What a collection removes, what it leaves, and when it removes nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.made_runs import HookedStore, elsewhere, write_state
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.marks import mark, marked
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    RegistryError,
    StaleAttemptError,
    StoreError,
)
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.process import this_uptime
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import Heartbeat, RegistryRunIds, now
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.retention import collect, expire_checkpoint, pin, unpin
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import ObjectInfo
from ckpt_tasks.testing import Fault, FaultInjector, FaultyStore, WrapperStore
from ckpt_tasks.testing.memory_registry import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.registry_wrappers import WrapperRegistry
from ckpt_tasks.testing.wrappers import OPERATIONS, Operation
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def run() -> RetainedRun:
    return RetainedRun()


def saved(run: RetainedRun, count: int, *, frozen: bool = False) -> list[CheckpointId]:
    """Checkpoints of a new attempt; with `frozen` they share bytes."""
    attempt = run.begin()
    return [
        attempt.save(10 * n, state_of(n, frozen=0 if frozen else n)) for n in range(1, count + 1)
    ]


def test_what_an_expiry_asks_of_the_store() -> None:
    """After each commit of a training: a few listings, and each record once; where bytes are
    counted, each index and its size as well. No tensor is read, however many there are.
    """

    def asked(count: int, **rules: object) -> int:
        run = RetainedRun()
        saved(run, count)
        store = FaultyStore(run.store, FaultInjector(counted=OPERATIONS))
        run.expire(through=store, **rules)
        assert not [path for _, path in store.log if path.endswith(".safetensors")]
        return store.count

    assert asked(22, latest=99) - asked(2, latest=99) == 20
    assert asked(22, max_bytes=10**9) - asked(2, max_bytes=10**9) == 60
    assert asked(2, latest=99) < 15


def test_bytes_go_after_the_grace(run: RetainedRun) -> None:
    """Not before, by the store's clock; then all of them, and the marks."""
    saved(run, 4)
    before = run.contents().keys()
    run.expire(latest=2)
    run.aged.age(GRACE - 60)
    report = run.collect()
    assert (report.removed, len(report.waiting)) == ([], 2)
    assert run.contents().keys() >= before
    run.aged.age(120)
    report = run.collect()
    assert (len(report.removed), report.waiting, report.freed > 18000) == (2, [], True)
    assert [c.sequence for c in run.left()] == [3, 4]
    run.check_whole()
    assert marked(run.store, run.layout)["expired"] == set()
    assert marked(run.store, run.layout)["collecting"] == set()


@pytest.mark.parametrize("days", [-1, 365])
def test_a_clock_that_is_set_ages_nothing(run: RetainedRun, days: int) -> None:
    """Back by a day or forwards by a year, before or after the marks: the grace passes as it is."""
    saved(run, 4)
    run.expire(latest=3)
    run.aged.set_clock(days * 86400)
    run.expire(latest=2)
    assert (run.collect().removed, len(run.collect().waiting)) == ([], 2)
    run.aged.age(abs(days) * 86400 + 2 * GRACE)
    assert len(run.collect().removed) == 2
    run.check_whole()


def test_a_clock_that_is_set_kills_no_save(run: RetainedRun) -> None:
    """Of an attempt whose latest heartbeat seems a year old, and was a moment ago."""
    saved(run, 1)
    run.put_claim(2, process=elsewhere())
    leave(run, "a0002-s0001-slow")
    beat = Heartbeat(attempt=2, beat=1, at=now(), uptime=this_uptime())
    run.store.put(run.layout.heartbeat(2), encode(beat))
    run.aged.set_clock(365 * 86400)
    assert run.collect().leftovers == []
    run.aged.age(2 * GRACE)
    assert run.collect().leftovers == [f"{run.layout.data}a0002-s0001-slow"]


def test_dry_run_tells_and_changes_nothing(run: RetainedRun) -> None:
    """What would go, and how many bytes."""
    saved(run, 3, frozen=True)
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    before = run.contents()
    told = collect(
        run.store, run.name, grace=GRACE, by="a test", dry_run=True, uptime=run.aged.uptime
    )
    assert run.contents() == before
    done = run.collect()
    assert (told.removed, told.freed) == (done.removed, done.freed)


def test_shared_bytes_stay_as_long_as_any_needs_them(run: RetainedRun) -> None:
    """The file of a removed checkpoint, and a reference to it by way of the latest; it goes with
    the last that names it, while the attempt lives.
    """
    attempt = run.begin()
    for step in range(1, 5):
        attempt.save(step, state_of(step))
        run.expire_and_collect(latest=1)
        assert [c.step for c in run.left()] == [step]
        run.check_whole()
    (last,) = run.left()
    assert run.record(last).written != run.record(last).size  # still refers to the first one's
    attempt.save(9, state_of(9, frozen=1))
    run.expire_and_collect(latest=1)
    run.check_whole()


def test_a_base_that_is_going_is_not_referred_to(run: RetainedRun) -> None:
    """The file itself stands, but the only checkpoint that keeps it may go at any moment."""
    attempt = run.begin()
    attempt.save(1, state_of(1))
    latest = attempt.save(2, state_of(2))
    mark(run.store, run.layout, "expired", latest, why="a test", by="a test")
    attempt.save(3, state_of(3))  # the first one's write stands for itself
    run.expire_and_collect(latest=1)
    (base,) = run.left()
    mark(run.store, run.layout, "expired", base, why="a test", by="a test")
    with pytest.raises(StoreError, match="which this checkpoint refers to"):
        attempt.save(4, state_of(4))
    fifth = run.record(attempt.save(5, state_of(5)))
    assert fifth.written == fifth.size


def test_a_base_known_to_be_damaged_is_not_referred_to(run: RetainedRun) -> None:
    """What is wrong with it may be a file of an older one, of which that is not known."""
    attempt = run.begin()
    unhealthy = attempt.save(1, state_of(1), nonfinite=["model.head"])
    base = attempt.save(2, state_of(2))
    run.damage(run.tensors_path(unhealthy), position=9000)
    mark(run.store, run.layout, "quarantined", base, why="a test", by="a test")
    with pytest.raises(StoreError, match="which this checkpoint refers to"):
        attempt.save(3, state_of(3))
    fourth = run.record(attempt.save(4, state_of(4)))
    assert fourth.written == fourth.size


def test_newest_is_read_before_an_older_one_goes(run: RetainedRun) -> None:
    """A damaged one is quarantined, and the next that stays is what older ones may go for."""
    first, second, third, newest = saved(run, 4)
    run.damage_tensors(str(newest))
    report = run.expire_and_collect(latest=2)
    assert report.verified == str(third)
    assert marked(run.store, run.layout)["quarantined"] == {newest}
    assert report.removed == [str(first), str(second)]
    assert marked(run.store, run.layout)["verified"] == {third}


def test_last_copy_stays(run: RetainedRun) -> None:
    """All that is kept is damaged: nothing goes, and a retry falls back to what has expired."""
    expired, *kept = saved(run, 3)
    for checkpoint in kept:
        run.damage_tensors(str(checkpoint))
    report = run.expire_and_collect(latest=2)
    assert report.removed == []
    assert report.refused == "no checkpoint is left that a retry could start from"
    attempt = run.begin()
    assert attempt.start == str(expired)
    run.aged.age(2 * GRACE)
    assert run.collect().removed == []
    attempt.save(100, state_of(100))
    run.aged.age(2 * GRACE)
    assert run.collect().removed == [str(expired)]


def test_what_is_newer_than_all_that_is_whole_stays(run: RetainedRun) -> None:
    """It has expired, and the newest, which was kept in its place, is found to be damaged."""
    _, expired, newest = every = saved(run, 3)
    mark(run.store, run.layout, "expired", expired, why="a test", by="a test")
    run.damage_tensors(str(newest))
    run.aged.age(2 * GRACE)
    report = run.collect()
    assert (report.removed, report.refused) == ([], None)
    assert run.left() == every
    assert marked(run.store, run.layout)["collecting"] == set()


def test_one_read_serves_all_older_ones(run: RetainedRun) -> None:
    """The newest is not read again while what goes is older than one known to be whole."""
    attempt = run.begin()
    for step in range(1, 5):
        attempt.save(step, state_of(step, frozen=step))
    run.expire_and_collect(latest=3)
    attempt.save(5, state_of(5, frozen=5))
    read: list[str] = []
    store = HookedStore(run.store, lambda op, path: read.append(path) if "read" in op else None)
    run.expire(latest=3)
    run.aged.age(2 * GRACE)
    assert len(run.collect(through=store).removed) == 1
    assert not [path for path in read if path.endswith(".safetensors")]


def test_start_of_an_attempt_stays(run: RetainedRun) -> None:
    """What a person has resumed from, though it had expired, until there is something newer."""
    asked, *_ = saved(run, 3)
    run.expire(latest=1)
    second = run.begin("flow-run-2", resume=str(asked))
    run.aged.age(2 * GRACE)
    report = run.collect()
    assert [kept.why for kept in report.kept] == ["attempt 2 goes on from it"]
    assert asked in run.left()
    newest = second.save(100, state_of(100))
    run.expire_and_collect(latest=1)
    run.aged.age(2 * GRACE)
    run.collect()
    assert run.left() == [newest]
    run.check_whole()


# -- pins -----------------------------------------------------------------------------------------


def test_pinned_ones_stay(run: RetainedRun) -> None:
    """A pin takes an expired one back; unpinned, it has a whole grace again."""
    first, *_ = saved(run, 3)
    run.expire(latest=1)
    pin(run.store, run.layout, first, why="paper", by="me")
    view = {c.id: c for c in view_run(run.store, run.name).checkpoints}[str(first)]
    assert (view.standing, view.pin) == ("valid", "paper (me)")
    run.expire_and_collect(latest=1)
    assert [c.step for c in run.left()] == [10, 30]
    mark(run.store, run.layout, "expired", first, why="planned before the pin", by="a test")
    run.aged.age(2 * GRACE)
    assert unpin(run.store, run.layout, first)
    assert not unpin(run.store, run.layout, first)
    run.expire(latest=1)
    assert run.collect().removed == []
    run.aged.age(2 * GRACE)
    assert run.collect().removed == [str(first)]


def test_too_late_to_pin(run: RetainedRun) -> None:
    """What is being collected, or gone, cannot be pinned; the pin that was tried is taken back."""
    first, _ = saved(run, 2)
    mark(run.store, run.layout, "collecting", first, why="a test", by="a test")
    with pytest.raises(CheckpointNotFoundError, match="is being collected"):
        pin(run.store, run.layout, first, why="paper", by="me")
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint"):
        pin(run.store, run.layout, CheckpointId(5, 5, 5), why="paper", by="me")
    assert marked(run.store, run.layout)["pins"] == set()


def test_pinned_while_it_is_claimed(run: RetainedRun) -> None:
    """The collection sees a pin that came before its mark, gives way, and takes the mark back."""
    first, *_ = saved(run, 2)
    run.expire(latest=1)
    run.aged.age(2 * GRACE)

    def before(operation: Operation, path: str) -> None:
        if (operation, path) == ("create", run.layout.mark("collecting", first)):
            pin(run.store, run.layout, first, why="paper", by="me")

    report = run.collect(through=HookedStore(run.store, before))
    assert [kept.why for kept in report.kept] == ["pinned: paper (me)"]
    marks = marked(run.store, run.layout)
    assert (marks["pins"], marks["collecting"], marks["expired"]) == ({first}, set(), set())
    run.check_whole()


def test_newest_cannot_be_expired_by_hand(run: RetainedRun) -> None:
    """Nor a pinned one; any other can, whatever the rules say."""
    first, second, newest = saved(run, 3)
    mark(run.store, run.layout, "pins", second, why="paper", by="me")
    for checkpoint, why in ((newest, "the newest that a retry"), (second, "pinned: paper")):
        with pytest.raises(ConfigError, match=why):
            expire_checkpoint(run.store, run.name, str(checkpoint), by="me")
    expire_checkpoint(run.store, run.name, str(first), by="me")
    assert marked(run.store, run.layout)["expired"] == {first}


# -- the registry ------------------------------------------------------------------------------


def registered(run: RetainedRun, memory: RegistryMemory) -> MemoryRegistry:
    """A registry in which all checkpoints of the run are."""
    description = RunDescription(
        run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
    )
    registry = MemoryRegistry(memory)
    ids = registry.create_run(description)
    run.store.create(run.layout.registry_ids(registry.name), encode(ids))
    registry.open_run(ids, description)
    for checkpoint in run.left():
        run.register(registry, str(checkpoint))
    return registry


def test_registry_before_record_before_data(run: RetainedRun) -> None:
    """Whatever dies in between, nothing is registered or committed that is not there."""
    first, *_ = saved(run, 2)
    registry = registered(run, RegistryMemory())
    run.expire(registry=registry, latest=1)
    run.aged.age(2 * GRACE)
    order: list[str] = []

    def before(operation: Operation, path: str) -> None:
        if operation == "delete":
            assert str(first) not in registry.registered()
            order.append(path.removeprefix(run.layout.folder).partition("/")[0])

    run.collect(registry=registry, through=HookedStore(run.store, before))
    assert list(dict.fromkeys(order)) == ["commits", "data", "marks"]
    assert order.count("data") == 2
    run.check_whole()


def test_what_an_alias_holds_stays(run: RetainedRun) -> None:
    """Also where the alias came after the expiry, or while the checkpoint was claimed."""
    first, second, third, _ = saved(run, 4)
    registry = registered(run, RegistryMemory())
    registry.set_alias("best", registry.registered()[str(first)])
    run.expire(registry=registry, latest=1)
    assert marked(run.store, run.layout)["expired"] == {second, third}
    registry.set_alias("mine", registry.registered()[str(second)])
    run.aged.age(2 * GRACE)

    def before(operation: Operation, path: str) -> None:
        if (operation, path) == ("create", run.layout.mark("collecting", third)):
            registry.set_alias("late", registry.registered()[str(third)])

    report = run.collect(registry=registry, through=HookedStore(run.store, before))
    assert {kept.why for kept in report.kept} == {"alias 'mine'", "alias 'late'"}
    assert len(run.left()) == 4
    assert marked(run.store, run.layout)["collecting"] == set()


@pytest.mark.parametrize("answer", ["refused", "away"])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_the_registry_does_not_let_go_keeps_what_it_refers_to(
    run: RetainedRun, answer: str, at_once: bool
) -> None:
    """An alias that comes after the last look, or a registry that is away by then: bytes that a
    checkpoint shares with one that has just been removed, or was long ago, stay with it.
    """
    attempt = run.begin()
    first, second = (attempt.save(step, state_of(step)) for step in (1, 2))
    attempt.save(3, state_of(3, frozen=3))
    registry = registered(run, RegistryMemory())
    run.expire(registry=registry, latest=1 if at_once else 2)
    run.aged.age(2 * GRACE)
    if not at_once:
        assert run.collect(registry=registry).removed == [str(first)]
        run.expire(registry=registry, latest=1)
        run.aged.age(2 * GRACE)

    class Late(WrapperRegistry):
        def forget(self, checkpoint: str, *, aliases: bool = False) -> None:
            if checkpoint == str(second) and answer == "away":
                raise RegistryError("away")
            if checkpoint == str(second):
                self.set_alias("late", self.registered()[checkpoint])
            super().forget(checkpoint, aliases=aliases)

    run.collect(registry=Late(registry))
    assert [c.step for c in run.left()] == [2, 3]
    assert marked(run.store, run.layout)["collecting"] == set()
    run.check_whole()


def test_registry_that_cannot_be_asked_costs_nothing(run: RetainedRun) -> None:
    """Away, or not given for a run that it has: nothing is marked, nothing deleted."""
    saved(run, 3)
    memory = RegistryMemory()
    registry = registered(run, memory)
    run.expire(registry=registry, latest=1)
    run.aged.age(2 * GRACE)
    before = run.paths("data", "commits")
    with pytest.raises(RegistryError, match="is in a registry"):
        run.expire(latest=1)
    assert "is in a registry" in (run.collect().refused or "")
    memory.available = False
    with pytest.raises(RegistryError, match="switched off"):
        run.expire(registry=registry, latest=1)
    assert "switched off" in (run.collect(registry=registry).refused or "")
    assert run.paths("data", "commits") == before


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        pytest.param(Fault(at=2), "put", id="behind the claims"),
        pytest.param(Fault(at=3, times=9), "create", id="at the second claim"),
    ],
)
def test_a_collection_that_a_full_disk_stops_stops_no_later_one(
    run: RetainedRun, monkeypatch: pytest.MonkeyPatch, fault: Fault, counted: str
) -> None:
    """What it has claimed is given back: the next one need not wait for a grace."""
    monkeypatch.setitem(create_once.__kwdefaults__, "sleep", lambda seconds: None)
    first, second, _ = saved(run, 3)
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    with pytest.raises(StoreError):
        run.collect(through=FaultyStore(run.store, [fault], counted={counted}))
    assert run.collect().removed == [str(first), str(second)]


# -- what cannot be known ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        pytest.param(
            RetainedRun.make_later_version, "a later version has written here", id="unknown feature"
        ),
        pytest.param(
            lambda run, c: run.damage(run.layout.commit(c), position=40),
            "what a damaged checkpoint needs cannot be told",
            id="damaged record",
        ),
        pytest.param(
            lambda run, c: run.damage(run.index_path(c), position=40),
            "which files are needed cannot be told",
            id="damaged index",
        ),
        pytest.param(
            lambda run, c: run.damage(run.layout.resumed(1), position=4),
            "what belongs to the run cannot be told",
            id="damaged lineage",
        ),
    ],
)
def test_nothing_goes_where_needs_are_unknown(
    run: RetainedRun, harm: Callable[[RetainedRun, CheckpointId], None], says: str
) -> None:
    """Any record that cannot be read may need any bytes."""
    _, second, *_ = saved(run, 4)
    run.expire(latest=3)
    run.aged.age(2 * GRACE)
    harm(run, second)
    before = run.paths("data", "commits")
    report = run.collect()
    assert says in (report.refused or "")
    assert run.paths("data", "commits") == before
    assert marked(run.store, run.layout)["collecting"] == set()


def test_a_damaged_record_can_be_given_up(run: RetainedRun) -> None:
    """By a person, by its id; then it goes as any other."""
    first, *_ = saved(run, 3)
    run.damage(run.layout.commit(first), position=40)
    assert [v.keep for v in run.expire(latest=1).verdicts] == [True, False, True]
    expire_checkpoint(run.store, run.name, str(first), by="me")
    run.aged.age(2 * GRACE)
    assert len(run.collect().removed) == 2
    run.check_whole()


def test_store_without_times(run: RetainedRun) -> None:
    """Nothing goes where it cannot be told how old anything is."""

    class Timeless(WrapperStore):
        def list_objects(self, prefix: str) -> list[ObjectInfo]:
            return [ObjectInfo(info.path, info.size) for info in super().list_objects(prefix)]

    saved(run, 3)
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    report = run.collect(through=Timeless(run.store))
    assert report.refused == "the store does not tell when an object was written"


def test_stale_attempt_prunes_nothing(run: RetainedRun) -> None:
    """Neither marks nor deletes, in an attempt's name, once a later one is claimed."""
    saved(run, 3)
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    run.begin()
    before = run.paths("data", "commits")
    fence = Fence(run.store, run.layout, 1)
    with pytest.raises(StaleAttemptError):
        collect(
            run.store,
            run.name,
            grace=GRACE,
            by="attempt 1",
            fence=fence,
            uptime=run.aged.uptime,
        )
    assert run.paths("data", "commits") == before
    assert marked(run.store, run.layout)["collecting"] == set()


@pytest.mark.parametrize(
    ("operation", "part"), [("read_into", ".safetensors"), ("read", ".heartbeat")]
)
def test_a_later_attempt_ends_a_collection_at_once(
    run: RetainedRun, operation: Operation, part: str
) -> None:
    """Claimed while the newest checkpoint is read, or before what killed writes have left goes:
    neither marked nor deleted any more.
    """
    saved(run, 3)
    leave(run, "a0001-s0009-dead")
    run.expire(latest=1)
    run.aged.age(2 * GRACE)
    at_claim: dict[str, bytes] = {}

    def before(asked: Operation, path: str) -> None:
        if asked == operation and path.endswith(part) and not at_claim:
            run.claim()
            at_claim.update(run.contents())

    fence = Fence(run.store, run.layout, 1)
    store = HookedStore(run.store, before)
    with pytest.raises(StaleAttemptError):
        collect(store, run.name, grace=GRACE, by="attempt 1", fence=fence, uptime=run.aged.uptime)
    assert run.contents() == at_claim


# -- leftovers -----------------------------------------------------------------------------------


def leave(run: RetainedRun, write_id: str) -> None:
    """What a write leaves whose process was killed before the commit."""
    write_state(run.store, run.layout, state_of(1), write_id=write_id)


def test_leftovers_of_dead_writes_go(run: RetainedRun) -> None:
    """After a grace, of attempts that are over; all else in the folder stays."""
    saved(run, 1)
    leave(run, "a0001-s0002-dead")
    run.store.put(f"{run.layout.data}notes.txt", b"somebody else's")
    assert run.collect().leftovers == []
    run.aged.age(2 * GRACE)
    report = run.collect()
    assert report.leftovers == [f"{run.layout.data}a0001-s0002-dead"]
    run.store.delete(f"{run.layout.data}notes.txt")
    run.check_whole()


def test_what_was_touched_within_the_grace_stays(run: RetainedRun) -> None:
    """Of an attempt that is over, too, as long as any of its files is so young."""
    saved(run, 1)
    leave(run, "a0001-s0002-dead")
    run.put_claim(2, process=elsewhere())
    run.aged.age(2 * GRACE)
    run.store.put(f"{run.layout.data}a0001-s0002-dead/late.rank0000.safetensors", b"late")
    assert run.collect().leftovers == []
    run.aged.age(2 * GRACE)
    assert run.collect().leftovers == [f"{run.layout.data}a0001-s0002-dead"]


def test_writes_of_a_living_attempt_stay(run: RetainedRun) -> None:
    """However long its save takes; its heart says that it lives."""
    saved(run, 1)
    run.put_claim(2, process=elsewhere())
    leave(run, "a0001-s0002-dead")
    leave(run, "a0002-s0001-slow")
    run.aged.age(2 * GRACE)
    beat = Heartbeat(attempt=2, beat=1, at=now())
    run.store.put(run.layout.heartbeat(2), encode(beat))
    assert run.collect().leftovers == [f"{run.layout.data}a0001-s0002-dead"]
    run.aged.age(2 * GRACE)
    assert run.collect().leftovers == [f"{run.layout.data}a0002-s0001-slow"]


def test_run_that_never_committed(run: RetainedRun) -> None:
    """Its leftovers go as well."""
    run.begin()
    leave(run, "a0001-s0001-dead")
    run.aged.age(2 * GRACE)
    assert len(run.collect().leftovers) == 1
    assert run.paths("data") == set()


def test_registry_ids_of_any_kind_are_found(run: RetainedRun) -> None:
    """Whatever the registry is called."""
    saved(run, 1)
    ids = RegistryRunIds(
        tracking_uri="x://", experiment_id="1", experiment="e", run_id="r", registered_model="m"
    )
    run.store.create(run.layout.registry_ids("other"), encode(ids))
    assert "other.json" in (run.collect().refused or "")
