"""Agreement of ranks on the step to save; each rank is a thread here, its store a real one."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from ckpt_tasks.errors import StoreError
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.letters import AgreedSave
from ckpt_tasks.training.ranks.messages import connect_ranks
from ckpt_tasks.types import SaveDecision

STOP = SaveDecision("signal", "asked to stop")
TIMED = SaveDecision("duration", "every 10 s")


@contextmanager
def agreements(world_size: int, **how: Any) -> Iterator[list[RankAgreement]]:
    with ExitStack() as stack:
        store: Any = connect_ranks("127.0.0.1", 0, serve=True)
        ranks = [
            RankAgreement(store.clone(), rank, world_size, **how) for rank in range(world_size)
        ]
        for rank in ranks:
            stack.callback(rank.close)
        yield ranks


def in_threads(functions: list[Callable[[], Any]], *, seconds: float = 60) -> list[Any]:
    """What each returned; none takes longer than `seconds`."""
    results: list[Any] = [None] * len(functions)

    def run(number: int) -> None:
        results[number] = functions[number]()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    return results


def steps(
    agreement: RankAgreement,
    pause: float,
    *,
    count: int,
    first: int = 1,
    ask: dict[int, SaveDecision] | None = None,
) -> list[tuple[int, AgreedSave]]:
    """Do `count` steps of `pause` seconds, from `first`; the saves that were agreed, by step.

    Ends at a save that a signal asked for.
    """
    saves = []
    for step in range(first, first + count):
        time.sleep(pause)
        if ask and step in ask:
            agreement.ask(ask[step])
        save = agreement.at_step(step)
        if save is not None:
            saves.append((step, save))
            if save.trigger == "signal":
                break
    return saves


def run_steps(
    ranks: list[RankAgreement],
    pauses: list[float],
    count: int,
    ask: dict[int, dict[int, SaveDecision]],
    *,
    first: int = 1,
) -> list[list[tuple[int, AgreedSave]]]:
    return in_threads(
        [
            lambda rank=rank, pause=pause: steps(  # type: ignore[misc]
                rank, pause, count=count, first=first, ask=ask.get(rank.rank)
            )
            for rank, pause in zip(ranks, pauses, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "pauses",
    [
        pytest.param([0.001] * 3, id="alike"),
        pytest.param([0.0002, 0.003, 0.001], id="rank 0 far ahead"),
        pytest.param([0.003, 0.0002, 0.001], id="rank 0 far behind"),
    ],
)
@pytest.mark.parametrize("signalled", [0, 2])
def test_a_signal_on_one_rank_saves_the_same_step_on_all(
    pauses: list[float], signalled: int
) -> None:
    """However far ranks run apart: all save one step, once, and stop there."""
    with agreements(3) as ranks:
        saved = run_steps(ranks, pauses, 100_000, {signalled: {5: STOP}})
    first = saved[0]
    assert len(first) == 1
    assert saved == [first] * 3
    step, save = first[0]
    assert step > 5
    assert (save.number, save.decision) == (1, STOP)


def test_a_signal_on_every_rank_is_one_save() -> None:
    """As torchrun passes a signal on to all of them."""
    with agreements(3) as ranks:
        asks = {rank: {10 + rank: STOP} for rank in range(3)}
        saved = run_steps(ranks, [0.001] * 3, 100_000, asks)
        assert [len(saves) for saves in saved] == [1, 1, 1]
        assert len({saves[0] for saves in saved}) == 1


def test_a_save_that_the_end_forestalls_fails_no_other() -> None:
    """One that was agreed for a step that never comes: its number may be that of one made since,
    whose parts are perhaps still being written.
    """
    failed: list[int] = []

    def note(number: int, why: str) -> None:
        failed.append(number)

    with agreements(2, on_failure=note) as ranks:
        ranks[0].ask(TIMED, step=1_000_000)
        saved = run_steps(ranks, [0.001] * 2, 100_000, {0: {5: STOP}})
        ends = in_threads([lambda rank=rank: rank.meet("end", STOP, last=True) for rank in ranks])  # type: ignore[misc]
    made = [saved[0][0][1].number, ends[0].number]
    assert (saved[1], ends[1]) == (saved[0], ends[0])
    assert len(failed) == 2
    assert not set(failed) & set(made)


def test_saves_are_numbered_alike_in_the_order_of_their_steps() -> None:
    """Several, asked for by several ranks."""
    asks = {0: {5: TIMED, 200: TIMED}, 1: {100: TIMED}, 2: {300: STOP}}
    with agreements(3) as ranks:
        saved = run_steps(ranks, [0.001, 0.0015, 0.0005], 100_000, asks)
    assert saved == [saved[0]] * 3
    assert [save.number for _, save in saved[0]] == list(range(1, len(saved[0]) + 1))
    assert len(saved[0]) > 1
    assert [step for step, _ in saved[0]] == sorted({step for step, _ in saved[0]})


def test_a_step_ahead_is_saved_exactly() -> None:
    """As for a save every n steps, which a resumed run makes where an uninterrupted one does."""
    with agreements(2) as ranks:
        ranks[0].ask(SaveDecision("steps", "every 500 steps"), step=500)
        saved = run_steps(ranks, [0.0005, 0.001], 600, {})
    assert [step for step, _ in saved[0]] == [500]
    assert saved[0] == saved[1]


def test_a_step_that_has_gone_by_is_dropped() -> None:
    """Nobody saves it, and nobody waits."""
    with agreements(2) as ranks:
        ranks[1].at_step(10)
        ranks[0].ask(SaveDecision("steps", "every 5 steps"), step=5)
        saved = run_steps(ranks, [0.001, 0.001], 100_000, {0: {250: STOP}}, first=11)
    assert [save.trigger for _, save in saved[0]] == ["signal"]
    assert saved[0] == saved[1]


def test_a_rank_whose_data_ended_holds_nobody_up() -> None:
    """It has no further step to save at; at the end all save together."""
    failures: list[tuple[int, str]] = []
    with agreements(2, on_failure=lambda *told: failures.append(told)) as ranks:
        assert ranks[1].at_step(7) is None
        rank_1 = threading.Thread(target=lambda: ends.append(ranks[1].meet("end", None, last=True)))
        ends: list[AgreedSave | None] = []
        rank_1.start()
        saved = steps(ranks[0], 0.001, count=200, ask={50: TIMED})
        final = ranks[0].meet("end", SaveDecision("final", "training ended"), last=True)
        rank_1.join(60)
    assert saved == []
    assert ends == [final]
    assert final is not None
    assert final.number == 1


def test_a_save_that_a_rank_cannot_reach_is_told() -> None:
    """Agreed for a step that lies behind the end of a rank's data: rank 0 hears of it."""
    told = threading.Event()
    failures: list[tuple[int, str]] = []

    def on_failure(number: int, why: str) -> None:
        failures.append((number, why))
        told.set()

    with agreements(2, on_failure=on_failure) as ranks:
        ranks[0].ask(TIMED, step=1000)
        while ranks[1]._held == math.inf or not ranks[1]._due:
            time.sleep(0.001)
        ranks[1].at_step(7)
        ender = threading.Thread(target=lambda: ranks[1].meet("end", None, last=True), daemon=True)
        ender.start()
        assert told.wait(60)
        final = ranks[0].meet("end", SaveDecision("final", "training ended"), last=True)
        ender.join(60)
    assert failures[0] == (1, "rank 1: rank 1 ended at step 7, before step 1000")
    assert final is not None
    assert final.fresh, "after a failure ranks plan anew"


def test_rank_0_decides_where_all_meet() -> None:
    """At an epoch's end it saves or does not, whatever the others would; numbers go on."""
    with agreements(2) as ranks:

        def epochs(rank: RankAgreement) -> list[AgreedSave | None]:
            found = []
            for epoch in range(4):
                wanted = TIMED if (epoch % 2 == 0) == (rank.rank == 0) else None
                found.append(rank.meet(f"epoch {epoch}", wanted))
            return found

        first, second = in_threads([lambda rank=rank: epochs(rank) for rank in ranks])  # type: ignore[misc]
    assert first == second
    assert [save and save.number for save in first] == [1, None, 2, None]


def test_a_place_to_which_rank_0_does_not_come() -> None:
    """The others wait for so long, and no longer."""
    with agreements(2, seconds=0.2) as ranks:
        with pytest.raises(StoreError, match=r"rank 1 has waited 0 s at epoch 3 for rank 0"):
            ranks[1].meet("epoch 3", None)
        assert ranks[1].at_step(1) is None


def test_a_lost_rank_0_holds_nobody_up() -> None:
    """It has proposed a step and gives no verdict: the others pass it, late, and go on."""
    with agreements(2, seconds=0.5) as ranks:
        ranks[0]._send_all = lambda messages, letter: (  # type: ignore[method-assign]
            None if type(letter).__name__ == "Verdict" else send(messages, letter)
        )
        send = RankAgreement._send_all.__get__(ranks[0])
        ranks[0].ask(TIMED, step=5)
        while ranks[1]._held == math.inf:
            time.sleep(0.001)
        assert [ranks[1].at_step(step) for step in range(1, 8)] == [None] * 7


def test_messages_are_exchanged_among_all() -> None:
    """For a plan of what ranks share; where one does not come there is no plan, and no deadlock."""
    with agreements(3, seconds=0.5) as ranks:
        messages = in_threads(
            [lambda rank=rank: rank.tell_all("plan/4", bytes([rank.rank])) for rank in ranks]  # type: ignore[misc]
        )
        assert messages == [[b"\0", b"\1", b"\2"]] * 3
        assert ranks[1].tell_all("plan/5", b"alone") is None


def test_a_rank_that_has_all_plan_anew() -> None:
    """The next save says so, once."""
    with agreements(2) as ranks:
        ranks[1].plan_anew()
        while not ranks[0]._fresh:
            time.sleep(0.001)
        saves = [ranks[0].meet(f"epoch {epoch}", TIMED) for epoch in range(2)]
    assert [save and save.fresh for save in saves] == [True, False]


def test_one_name_for_all_and_another_for_each_start() -> None:
    """The unique part of writes' names."""
    names = []
    for _ in range(2):
        with agreements(2) as ranks:
            one, other = in_threads([rank.nonce for rank in ranks])
            assert one == other
            names.append(one)
    assert names[0] != names[1]
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in names)
