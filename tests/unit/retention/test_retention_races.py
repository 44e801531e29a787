"""Collections that die, and collections beside one another, beside saves, restores and pins."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_runs import HookedStore, MadeAttempt, memory_store, save_request
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.checkpointer import catalog
from ckpt_tasks.checkpointer.marks import mark, marked
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.errors import CheckpointNotFoundError, CkptTasksError, StaleAttemptError, StoreError
from ckpt_tasks.fencing import attempts
from ckpt_tasks.retention import pin, references
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing.explore import explore
from ckpt_tasks.testing.interleave import (
    Actor,
    ActorKilled,
    Choice,
    Fate,
    Interleaving,
    follow,
    run_interleaved,
)
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.types import CheckpointId


@pytest.fixture(autouse=True)
def _no_waiting_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(create_once.__kwdefaults__, "sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def _one_operation_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attempts, catalog, references):
        monkeypatch.setattr(module, "_PARALLEL_READS", 1)


def scene(store: Store | None = None) -> RetainedRun:
    """Five checkpoints that share bytes, of two attempts; two have expired long ago, beside what
    a killed write has left.
    """
    run = RetainedRun(store or memory_store())
    first = run.begin()
    for step in (1, 2):
        first.save(step, state_of(step, frozen=step))
    second = run.begin()
    for step in (3, 4, 5):
        second.save(step, state_of(step, frozen=2))
    run.store.put(f"{run.layout.data}a0001-s0003-dead/model.rank0000.safetensors", b"torn")
    run.expire(latest=3)
    run.aged.age(2 * GRACE)
    return run


def collecting(run: RetainedRun) -> Actor:
    return lambda store: run.collect(through=store)


def check_end(run: RetainedRun) -> None:
    """What a collection that nothing disturbs comes to."""
    assert [c.step for c in run.left()] == [3, 4, 5]
    run.check_whole()
    marks = marked(run.store, run.layout)
    assert (marks["expired"], marks["collecting"]) == (set(), set())


def check_records_are_whole(run: RetainedRun) -> None:
    """At any moment: a record goes before its bytes."""
    for checkpoint in run.left():
        assert verify_checkpoint(run.store, run.name, checkpoint).ok


@pytest.mark.parametrize("fate", ["kill", "lose_answer"])
def test_a_collection_that_dies_anywhere_is_completed_by_the_next(fate: Fate) -> None:
    """Killed before its n-th operation, or without an answer to it, for all n."""
    operations = 0
    while True:
        run = scene()
        schedule = follow([*([0] * operations), Choice(0, fate)])
        died = run_interleaved(run.store, [collecting(run)], schedule)
        check_records_are_whole(run)
        if len(died.steps) <= operations:
            break
        assert died.errors[0] is None or isinstance(died.errors[0], (ActorKilled, StoreError))
        run.aged.age(2 * GRACE)
        report = run.collect()
        assert report.refused is None
        check_end(run)
        operations += 1
    assert operations > 40


def test_of_two_collections_one_removes_each_checkpoint() -> None:
    """Another one does all of its work before the n-th operation of the first, for all n."""
    operations = 0
    while True:
        run = scene()
        schedule = follow([Choice(1)] * operations)
        actors = [collecting(run), collecting(run)]
        done = run_interleaved(run.store, actors, schedule, unseen=[run.layout.data])
        assert done.errors == [None, None], done
        removed = [one for report in done.results for one in report.removed]
        assert len(removed) == len(set(removed)) == 2, done
        check_end(run)
        if sum(step.pending.actor for step in done.steps) < operations:
            break
        operations += 1
    assert operations > 40


def test_what_is_being_removed_is_never_shown_as_kept() -> None:
    """A collection does all of its work before the n-th operation of who looks at the run, for all
    n: rules that counted what it removes would keep one checkpoint less of those that are left.
    """
    for number in itertools.count():
        run = scene()
        operations = itertools.count()

        def before(
            operation: Operation,
            path: str,
            run: RetainedRun = run,
            operations: Iterator[int] = operations,
            number: int = number,
        ) -> None:
            if next(operations) == number:
                run.collect()

        view = catalog.view_run(HookedStore(run.store, before), run.name)
        valid = [CheckpointId.parse(c.id).step for c in view.checkpoints if c.standing == "valid"]
        assert valid == [5, 4, 3], number
        if next(operations) <= number:
            break
    assert number > 10


def test_pin_or_collection_gives_way_in_every_order() -> None:
    """A pin that was promised is kept; one that comes too late says so, and leaves no mark."""
    runs: list[RetainedRun] = []
    outcomes = set()

    def prepare() -> tuple[Store, list[Actor]]:
        run = RetainedRun()
        attempt = run.begin()
        first = attempt.save(1, state_of(1))
        attempt.save(2, state_of(2))
        mark(run.store, run.layout, "expired", first, why="a test", by="a test")
        run.aged.age(2 * GRACE)
        runs[:] = [run]
        return run.store, [
            collecting(run),
            lambda store: pin(store, run.layout, first, why="paper", by="me"),
        ]

    def check(ended: Interleaving) -> None:
        run = runs[0]
        late = ended.errors[1]
        assert late is None or isinstance(late, CheckpointNotFoundError)
        pinned = bool(marked(run.store, run.layout)["pins"])
        assert pinned == (late is None)
        assert not pinned or [c.step for c in run.left()] == [1, 2]
        check_records_are_whole(run)
        outcomes.add((pinned, len(run.left())))

    assert explore(prepare, check, unseen=[runs_data()]) > 20
    assert {(True, 2), (False, 1)} <= outcomes


def runs_data() -> str:
    return RetainedRun().layout.data


SWITCHES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 30)).map(lambda run: [run[0]] * run[1]), max_size=14
).map(lambda runs: [actor for run in runs for actor in run])


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(picks=SWITCHES, kill=st.none() | st.tuples(st.integers(0, 80), st.integers(0, 3)))
def test_collections_beside_a_save_and_a_restore(
    picks: list[int], kill: tuple[int, int] | None
) -> None:
    """Two of them, an attempt that saves and one that takes over, with a kill, in drawn orders:
    nothing needed is lost, and in the end nothing else is left.
    """
    run = scene()
    attempt = run.begin()
    made: list[CheckpointId] = []

    def save(store: Store) -> None:
        checkpointer = run.checkpointer(store, attempt.attempt, attempt.recovered)
        for step in (6, 7):
            state = state_of(step, frozen=2 if step == 6 else step)
            made.append(checkpointer.save(state, save_request(step)).checkpoint)

    def take_over(store: Store) -> str | None:
        return run.begin(through=store).start

    def retain(store: Store) -> None:
        run.expire(through=store, latest=2)
        run.collect(through=store)

    schedule: list[int | Choice] = list(picks)
    if kill is not None:
        schedule.insert(kill[0], Choice(kill[1], "kill"))
    ended = run_interleaved(
        run.store, [retain, retain, save, take_over], follow(schedule), unseen=[run.layout.data]
    )
    expected = (StaleAttemptError, StoreError, ActorKilled)
    assert all(error is None or isinstance(error, expected) for error in ended.errors), ended
    check_records_are_whole(run)
    assert isinstance(ended.errors[3], ActorKilled) or ended.results[3] is not None, ended
    run.begin().save(100, state_of(100, frozen=100))
    for _ in range(2):
        run.expire_and_collect(latest=2)
    assert len(run.left()) == 2
    run.check_whole()


@pytest.mark.parametrize("rounds", [60, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_two_collectors_and_a_saver(rounds: int, tmp_path: Path) -> None:
    """Threads on a local store, every tenth round a new attempt that restores: all that is kept
    can be read at any time, and what is not needed is gone in the end.
    """
    run = RetainedRun(LocalStore(tmp_path))
    failed: list[BaseException] = []
    rules = {"latest": 3, "every_steps": 100}
    attempt = run.begin()
    attempt.save(1, state_of(1))

    def guarded(action: Callable[[], object]) -> Callable[[], None]:
        def act() -> None:
            try:
                action()
            except CkptTasksError as error:
                failed.append(error)

        return act

    def retain() -> None:
        run.expire(**rules)
        report = run.collect()
        assert report.refused is None, report

    for number in range(rounds):
        run.aged.age(2 * GRACE)  # all marks of earlier rounds have had their grace
        if number % 10 == 9:
            attempt = run.begin()

        def save(number: int = number, saver: MadeAttempt = attempt) -> None:
            for step in (2 * number + 2, 2 * number + 3):
                saver.save(step, state_of(step, frozen=number // 7))

        threads = [threading.Thread(target=guarded(one)) for one in (save, retain, retain)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        newest = run.left()[-1]
        assert verify_checkpoint(run.store, run.name, newest).ok
    for _ in range(2):
        run.expire_and_collect(**rules)
    steps = [c.step for c in run.left()]
    last = 2 * rounds + 1
    assert steps == [*range(100, last - 2, 100), last - 2, last - 1, last]
    run.check_whole()
