"""The real claim, recovery, commit and fences keep the protocol's promises when interleaved.

Two attempts are run under every order of their store operations that can make a difference;
three, with kills and losses, under schedules that hypothesis draws. After each run the promises
are read from the store, and one more attempt must go on from all that was registered.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from protocol_actors import (
    LAYOUT,
    REGISTRY,
    UNSEEN,
    attempt,
    check_promises,
    empty_store,
)

from ckpt_tasks.errors import StaleAttemptError, StoreError
from ckpt_tasks.fencing import Fence
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
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


@pytest.fixture(autouse=True)
def _no_waiting_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(create_once.__kwdefaults__, "sleep", lambda seconds: None)


def explore_attempts(saves: Sequence[int], limits: Limits) -> int:
    """Check every schedule of attempts that save so many times each."""
    stores: list[Store] = []

    def prepare() -> tuple[Store, list[Actor]]:
        stores[:] = [empty_store()]
        return stores[0], [attempt(count) for count in saves]

    def check(run: Interleaving) -> None:
        expected = (StaleAttemptError, StoreError, ActorKilled)
        assert all(error is None or isinstance(error, expected) for error in run.errors)
        check_promises(stores[0], run)

    return explore(prepare, check, limits=limits, unseen=UNSEEN)


@pytest.mark.parametrize(
    ("saves", "limits", "at_least"),
    [
        pytest.param(
            *([2, 2], Limits(), 100),
            id="two attempts, two saves each",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param([1, 1], Limits(kills=1), 500, id="one of two attempts is killed"),
        pytest.param(
            *([1, 0], Limits(lost_answers=1), 300),
            id="one answer is lost",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_every_interleaving_of_two_attempts_keeps_the_promises(
    saves: list[int], limits: Limits, at_least: int
) -> None:
    """Real attempts, under every order of operations that can make a difference."""
    assert explore_attempts(saves, limits) >= at_least


RUNS_OF_OPERATIONS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 16)).map(lambda run: [run[0]] * run[1]), max_size=8
).map(lambda runs: [actor for run in runs for actor in run])
"""Each actor goes on for a while: more interleavings of interest than switching at random."""

FAULTS = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.builds(
            Choice, st.integers(0, 2), st.sampled_from(["kill", "lose_request", "lose_answer"])
        ),
    ),
    max_size=3,
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(picks=RUNS_OF_OPERATIONS, faults=FAULTS)
def test_three_attempts_with_faults_keep_the_promises(
    picks: list[int], faults: list[tuple[int, Choice]]
) -> None:
    """Three real attempts, with up to three kills and losses at any of their operations."""
    schedule: list[int | Choice] = list(picks)
    for place, fault in faults:
        schedule.insert(place, fault)
    store = empty_store()

    run = run_interleaved(
        store, [attempt(2), attempt(2), attempt(1)], follow(schedule), unseen=UNSEEN
    )

    expected = (StaleAttemptError, StoreError, ActorKilled)
    assert all(error is None or isinstance(error, expected) for error in run.errors), str(run)
    check_promises(store, run)


def before_its_commit(waiting: Sequence[Pending]) -> Choice:
    """Actor 0 stops before its commit record until actor 1 has ended."""
    at = {pending.actor: pending for pending in waiting}
    commits = 0 in at and (at[0].operation, at[0].path[: len(LAYOUT.commits)]) == (
        "create",
        LAYOUT.commits,
    )
    return Choice(1 if 1 in at and (commits or 0 not in at) else 0)


def test_an_attempt_that_becomes_stale_before_its_commit_registers_nothing() -> None:
    """It passed its first fence; the second one ends it, and the later attempt's work stands."""
    store = empty_store()

    run = run_interleaved(store, [attempt(1), attempt(1)], before_its_commit, unseen=UNSEEN)

    assert isinstance(run.errors[0], StaleAttemptError)
    assert run.results[1] == [2]
    assert [info.path for info in store.list_objects(LAYOUT.commits)] == [
        "run/commits/step-00000001-a1-s1.json",
        "run/commits/step-00000001-a2-s1.json",
    ]
    assert [info.path for info in store.list_objects(REGISTRY)] == ["registry/step-00000001-a2-s1"]


def test_the_promises_break_without_a_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts whose fence lets everything pass are caught: the check can fail."""
    monkeypatch.setattr(Fence, "check", lambda self: None)

    with pytest.raises(AssertionError, match=r"stale attempt|two histories"):
        explore_attempts([2, 1], Limits())
