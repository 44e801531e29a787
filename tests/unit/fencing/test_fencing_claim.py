"""Claiming a run: who gets the next number, and who has to wait."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.made_runs import HookedStore, MadeRun, claim_request, memory_store

from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    NoProgressError,
    RunBusyError,
)
from ckpt_tasks.fencing.attempts import list_attempts, next_attempt, read_attempts
from ckpt_tasks.fencing.claim import Attempt, claim_attempt, open_run, read_run
from ckpt_tasks.fencing.process import process_is_alive, this_process
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Heartbeat, Process, now
from ckpt_tasks.recovery.recover import recover
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore
from ckpt_tasks.testing.wrappers import Operation


@pytest.fixture
def run() -> MadeRun:
    return MadeRun()


@pytest.fixture
def owner() -> Iterator[Process]:
    """A living process that some attempt is executed by."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    yield this_process(child.pid)
    child.kill()
    child.communicate()


def beat(run: MadeRun, attempt: int, number: int, *, ended: bool = False) -> None:
    record = Heartbeat(attempt=attempt, beat=number, at=now(), ended=ended)
    run.store.put(run.layout.heartbeat(attempt), encode(record))


def claim(run: MadeRun, clock: FakeClock, invocation: str, **request: object) -> Attempt:
    """Claim by the hands of a fake clock."""
    asked = claim_request(invocation, **request)
    return claim_attempt(run.store, run.layout, run.identity, asked, sleep=clock.sleep, clock=clock)


# -- the run's identity ---------------------------------------------------------------------------


def test_identity_is_made_once(run: MadeRun) -> None:
    """Whoever opens the run later finds the uid that it has."""
    assert open_run(run.store, run.layout, created_by="another") == run.identity
    assert read_run(run.store, run.layout) == run.identity


def test_identity_made_by_two_at_once() -> None:
    """Both go on with the one that stands."""
    store, layout = memory_store(), RunLayout("digits")
    others = []

    def before(operation: Operation, path: str) -> None:
        if operation == "create" and not others:
            others.append(open_run(store, layout, created_by="the other"))

    mine = open_run(HookedStore(store, before), layout, created_by="me")
    assert [mine] == others


def test_unknown_run_has_no_identity() -> None:
    """Reading makes nothing."""
    store = memory_store()
    with pytest.raises(CheckpointNotFoundError, match="no run 'digits'"):
        read_run(store, RunLayout("digits"))
    assert store.list_objects("") == []


# -- numbers --------------------------------------------------------------------------------------


def test_numbers_are_dense(run: MadeRun) -> None:
    """1, 2, 3; each attempt knows those before it, and says what it was asked for."""
    attempts = [run.claim(tags={"flow": "f"}, resume="fresh") for _ in range(3)]
    assert [attempt.number for attempt in attempts] == [1, 2, 3]
    assert [[e.number for e in a.earlier] for a in attempts] == [[], [1], [1, 2]]
    assert list_attempts(run.store, run.layout) == [1, 2, 3]
    last = read_attempts(run.store, run.layout)[-1].claim
    assert last == attempts[-1].claim
    assert (last.tags, last.resume, last.process) == ({"flow": "f"}, "fresh", this_process())


def test_next_attempt() -> None:
    """One more than the newest."""
    assert [next_attempt([]), next_attempt([1]), next_attempt([1, 2])] == [1, 2, 3]


def test_two_claimants(run: MadeRun) -> None:
    """The one that comes second takes the next number, and knows of the first."""
    first: list[Attempt] = []

    def before(operation: Operation, path: str) -> None:
        if operation == "create" and not first:
            first.append(run.claim())

    store = HookedStore(run.store, before)
    second = claim_attempt(store, run.layout, run.identity, claim_request())
    assert (first[0].number, second.number) == (1, 2)
    assert [e.claim for e in second.earlier] == [first[0].claim]


def test_many_claimants_at_once(run: MadeRun) -> None:
    """Every one gets a number of its own, without a gap."""
    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(lambda _: run.claim(without_commit=100), range(16)))
    assert sorted(attempt.number for attempt in attempts) == list(range(1, 17))


def test_lost_answer(run: MadeRun) -> None:
    """A claim that landed without an answer is this attempt's own, and not taken twice."""
    store = FaultyStore(run.store, [Fault(at=1, when="after")], counted={"create"})
    attempt = claim_attempt(store, run.layout, run.identity, claim_request())
    assert attempt.number == 1
    assert list_attempts(run.store, run.layout) == [1]


def test_earlier_attempts_are_read_after_the_claim(run: MadeRun) -> None:
    """What an earlier attempt resumed from in between counts."""
    first = run.claim()

    def before(operation: Operation, path: str) -> None:
        if operation == "create" and path == run.layout.attempt(2):
            recover(run.store, run.layout, run.identity, first)

    store = HookedStore(run.store, before)
    second = claim_attempt(store, run.layout, run.identity, claim_request())
    assert second.earlier[0].resumed is not None


def test_gap_in_the_numbers(run: MadeRun) -> None:
    """The fence asks for the next number only, so a run with a gap is refused."""
    run.put_claim(1)
    run.put_claim(3)
    with pytest.raises(ConfigError, match=r"\[2\] of 3 are missing"):
        run.claim()
    assert list_attempts(run.store, run.layout) == [1, 3]


# -- taking over ----------------------------------------------------------------------------------


def test_own_retry_takes_over_at_once(run: MadeRun, owner: Process) -> None:
    """The same invocation's retry ends the old process and waits for nothing."""
    run.put_claim(1, invocation="flow-run-1", process=owner)
    beat(run, 1, 1)
    clock = FakeClock()
    assert claim(run, clock, "flow-run-1").number == 2
    assert process_is_alive(owner) is False
    assert clock.slept == []


def test_own_retry_on_another_machine(run: MadeRun) -> None:
    """The old process cannot be reached; the fence holds it off."""
    run.put_claim(1, invocation="flow-run-1")
    clock = FakeClock()
    assert claim(run, clock, "flow-run-1").number == 2
    assert clock.slept == []


def test_busy(run: MadeRun, owner: Process) -> None:
    """Another invocation's attempt whose heart beats is left alone; the error says whose it is."""
    run.put_claim(1, invocation="flow-run-1", process=owner)
    beat(run, 1, 1)
    clock = FakeClock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        beat(run, 1, 1 + len(clock.slept))

    with pytest.raises(RunBusyError, match=rf"'flow-run-1' \(process {owner.pid}") as caught:
        claim_attempt(
            run.store, run.layout, run.identity, claim_request("other"), sleep=sleep, clock=clock
        )
    assert caught.value.exit_code == 5
    assert "--takeover" in str(caught.value)
    assert list_attempts(run.store, run.layout) == [1]
    assert process_is_alive(owner) is True


@pytest.mark.parametrize("beaten", [True, False], ids=["stopped", "never"])
def test_silent(run: MadeRun, owner: Process, beaten: bool) -> None:
    """Without a beat for the time asked for, by this observer's clock, the owner counts as dead;
    its process, which may only hang, is another invocation's to end.
    """
    run.put_claim(1, process=owner)
    if beaten:
        beat(run, 1, 7)
    clock = FakeClock()
    assert claim(run, clock, "other", takeover_after=60.0).number == 2
    assert clock() == pytest.approx(60, abs=1)
    assert process_is_alive(owner) is True


def test_ended(run: MadeRun) -> None:
    """An attempt that said that it has ended is replaced at once."""
    run.put_claim(1)
    beat(run, 1, 7, ended=True)
    clock = FakeClock()
    assert claim(run, clock, "other").number == 2
    assert clock.slept == []


def test_dead_process_on_this_machine(run: MadeRun) -> None:
    """A process known to be dead is replaced at once, however fresh its heartbeat."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    run.put_claim(1, process=this_process(child.pid))
    child.kill()
    child.communicate()
    beat(run, 1, 1)
    clock = FakeClock()
    assert claim(run, clock, "other").number == 2
    assert clock.slept == []


def test_takeover(run: MadeRun, owner: Process) -> None:
    """Asked to, another invocation takes over at once, and ends the owner where it can."""
    run.put_claim(1, process=owner)
    beat(run, 1, 1)
    clock = FakeClock()
    assert claim(run, clock, "other", takeover=True).number == 2
    assert process_is_alive(owner) is False
    assert clock.slept == []


def test_damaged_claim_of_a_living_owner(run: MadeRun) -> None:
    """Whose it is cannot be read, but it beats: everybody waits, the same invocation too."""
    run.put_claim(1)
    run.damage(run.layout.attempt(1))
    beat(run, 1, 1)
    clock = FakeClock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        beat(run, 1, 2)

    with pytest.raises(RunBusyError, match="its claim is unreadable"):
        claim_attempt(
            run.store, run.layout, run.identity, claim_request(), sleep=sleep, clock=clock
        )


def test_damaged_claim_of_a_silent_owner(run: MadeRun) -> None:
    """Its number is taken, so the next one follows it; the damage is told."""
    run.put_claim(1)
    run.damage(run.layout.attempt(1))
    attempt = claim(run, FakeClock(), "other")
    assert attempt.number == 2
    assert "attempts/0001.json is damaged" in attempt.earlier[0].damage[0]


# -- the cap --------------------------------------------------------------------------------------


def test_cap_on_attempts_without_a_commit(run: MadeRun) -> None:
    """After so many of one invocation's attempts in a row there is no further one; exit code 2."""
    for _ in range(3):
        run.claim(without_commit=3)
    with pytest.raises(NoProgressError, match="run 'digits': the last 3 attempts") as caught:
        run.claim(without_commit=3)
    assert caught.value.exit_code == 2
    assert list_attempts(run.store, run.layout) == [1, 2, 3]


def test_commit_resets_the_cap(run: MadeRun) -> None:
    """Attempts that made progress are fine, however many."""
    for _ in range(4):
        run.begin().save(10)
        run.claim(without_commit=2)
    assert run.claim(without_commit=2).number == 9


def test_unhealthy_commits_are_no_progress(run: MadeRun) -> None:
    """Attempts that end in NaN, however many checkpoints of it they commit, are capped."""
    run.begin().save(10)
    for _ in range(3):
        run.begin().save(20, nonfinite=["model.weight"])
    with pytest.raises(NoProgressError, match="last 3 attempts"):
        run.claim(without_commit=3)


def test_healthy_commit_among_unhealthy_ones_is_progress(run: MadeRun) -> None:
    """A retry starts from the last healthy one, so something was gained."""
    for _ in range(3):
        attempt = run.begin()
        attempt.save(20)
        attempt.save(30, nonfinite=["model.weight"])
    assert run.claim(without_commit=3).number == 4


def test_new_invocation_has_its_own_cap(run: MadeRun) -> None:
    """Somebody who starts it anew has looked at the cause, one hopes."""
    for _ in range(3):
        run.claim("flow-run-1", without_commit=3)
    assert run.claim("flow-run-2", without_commit=3).number == 4


def test_damaged_claim_counts_against_the_cap(run: MadeRun) -> None:
    """Damage is no way around the cap."""
    for _ in range(3):
        run.claim(without_commit=3)
    run.damage(run.layout.attempt(2))
    with pytest.raises(NoProgressError):
        run.claim(without_commit=3)


def _fail_again_and_again(run: MadeRun) -> None:
    """Three failures at step 31 from the newest checkpoint, and one from the older one."""
    first = run.begin()
    first.save(10)
    first.save(20)
    for _ in range(3):
        run.fail(run.begin().number, step=31)
    fallen_back = run.begin()
    fallen_back.save(20)
    run.fail(fallen_back.number, step=31)


@pytest.mark.parametrize("damaged", [None, 3], ids=["whole", "a damaged claim"])
def test_same_failure_from_an_older_checkpoint_too_is_final(
    run: MadeRun, damaged: int | None
) -> None:
    """That the attempt which fell back committed the step once more is no progress; and one of
    which it is not known whose it was counts.
    """
    _fail_again_and_again(run)
    if damaged is not None:
        run.damage(run.layout.attempt(damaged))
    with pytest.raises(NoProgressError, match=r"4 attempts ended at step 31 .*: bad, also from"):
        run.claim(without_commit=1000)


def test_new_invocation_after_a_final_failure(run: MadeRun) -> None:
    """Somebody who starts it anew may try again."""
    _fail_again_and_again(run)
    assert run.claim("flow-run-2").number == 6
