"""Real code under chosen interleavings, and under all of them."""

from __future__ import annotations

import pytest

from ckpt_tasks.errors import ObjectNotFoundError, StoreError
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing.explore import Limits, explore
from ckpt_tasks.testing.interleave import (
    Actor,
    ActorKilled,
    Choice,
    Interleaving,
    Pending,
    follow,
    run_interleaved,
)


@pytest.fixture
def store() -> Store:
    return fresh_store()


def fresh_store() -> Store:
    store = MemoryStore("interleave")
    for info in store.list_objects(""):
        store.delete(info.path)
    store.put("counter", b"0")
    return store


def increment(store: Store) -> None:
    """Read, then write: loses an update when another comes in between."""
    value = int(store.read("counter"))
    store.put("counter", str(value + 1).encode())


def writer(path: str) -> Actor:
    return lambda store: store.put(path, b"")


def test_a_schedule_decides_who_goes_on(store: Store) -> None:
    """Alternating picks make both actors read before either writes, so one update is lost."""
    run = run_interleaved(store, [increment, increment], follow([0, 1, 0, 0]))

    assert [step.pending.actor for step in run.steps] == [0, 1, 0, 1]
    assert store.read("counter") == b"1"


def test_without_a_schedule_each_actor_runs_to_its_end(store: Store) -> None:
    """An exhausted schedule lets the first actor that can go on finish."""
    run = run_interleaved(store, [increment, increment], follow([]))

    assert [step.pending.actor for step in run.steps] == [0, 0, 1, 1]
    assert store.read("counter") == b"2"


def test_a_run_can_be_repeated_from_its_choices() -> None:
    """The choices of a run are a schedule that gives the same steps again."""
    first = run_interleaved(fresh_store(), [increment] * 3, follow([2, 0, 1, 1, 0]))
    again = run_interleaved(fresh_store(), [increment] * 3, follow(first.choices))

    assert [str(step) for step in again.steps] == [str(step) for step in first.steps]


def test_a_killed_actor_does_nothing_more(store: Store) -> None:
    """A kill takes effect before the operation, and clean-up code reaches the store no more."""

    def tidy(store: Store) -> None:
        try:
            store.put("a", b"")
        finally:
            store.put("b", b"")

    run = run_interleaved(store, [tidy], follow([Choice(0, "kill")]))

    assert isinstance(run.errors[0], ActorKilled)
    assert [info.path for info in store.list_objects("")] == ["counter"]


@pytest.mark.parametrize(("fate", "stands"), [("lose_request", False), ("lose_answer", True)])
def test_a_loss_raises_and_takes_effect_or_not(store: Store, fate: str, stands: bool) -> None:
    """A lost request leaves nothing; a lost answer leaves the object."""
    run = run_interleaved(store, [writer("a")], follow([Choice(0, fate)]))

    assert isinstance(run.errors[0], StoreError)
    assert store.exists("a") is stands


def test_errors_of_an_operation_reach_the_actor_and_the_record(store: Store) -> None:
    """What the store raises is the actor's to handle, and stands in the step."""
    run = run_interleaved(store, [lambda s: s.read("none")], follow([]))

    assert isinstance(run.errors[0], ObjectNotFoundError)
    assert isinstance(run.steps[0].error, ObjectNotFoundError)
    assert not run.steps[0].took_effect


def test_operations_in_unseen_folders_do_not_wait(store: Store) -> None:
    """They are carried out at once and are no step."""
    actors = [writer("data/x"), writer("seen")]
    run = run_interleaved(store, actors, follow([]), unseen=["data/"])

    assert [step.pending.path for step in run.steps] == ["seen"]
    assert store.exists("data/x")


@pytest.mark.parametrize(
    ("one", "other", "conflict"),
    [
        (("read", "a"), ("read", "a"), False),
        (("read", "a"), ("put", "a"), True),
        (("put", "a"), ("put", "b"), False),
        (("list_objects", "x/"), ("create", "x/y"), True),
        (("list_objects", "x/"), ("create", "z/y"), False),
        (("exists", "x"), ("delete", "x"), True),
    ],
)
def test_operations_conflict_when_their_order_matters(
    one: tuple[str, str], other: tuple[str, str], conflict: bool
) -> None:
    """One of the two changes what the other sees or changes."""
    first, second = Pending(0, *one), Pending(1, *other)

    assert first.conflicts(second) is conflict
    assert second.conflicts(first) is conflict


def test_exploration_finds_a_lost_update() -> None:
    """Some schedule of two read-then-write actors loses one, and the error shows which."""
    stores: list[Store] = []

    def prepare() -> tuple[Store, list[Actor]]:
        stores.append(fresh_store())
        return stores[-1], [increment, increment]

    def check(run: Interleaving) -> None:
        assert stores[-1].read("counter") == b"2"

    with pytest.raises(AssertionError) as caught:
        explore(prepare, check)
    assert "actor 1: read counter\n" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("actors", "limits", "schedules"),
    [
        pytest.param([writer("a"), writer("b")], Limits(), 1, id="nothing shared"),
        pytest.param([writer("a"), writer("a")], Limits(), 2, id="one object"),
        pytest.param([writer("a")] * 3, Limits(), 6, id="one object, three actors"),
        pytest.param([increment, increment], Limits(), 4, id="read-then-write twice"),
        pytest.param([increment], Limits(kills=1), 2, id="a kill before the write"),
        pytest.param([writer("a")], Limits(lost_answers=1), 2, id="a lost answer"),
    ],
)
def test_every_schedule_that_differs_is_run_once(
    actors: list[Actor], limits: Limits, schedules: int
) -> None:
    """Orders of operations that do not see each other are one schedule."""
    seen: list[Interleaving] = []

    complete = explore(lambda: (fresh_store(), actors), seen.append, limits=limits)

    assert complete == len(seen) == schedules
    assert len({str(run) for run in seen}) == schedules
