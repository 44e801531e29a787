"""Real ranks, which train with collectives, run apart, get signals and die: one step for all."""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.sharded_runs import RankSaver, full_states, made, restore, same, train
from support.worlds import run_world

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.schedule.policy import SaveContext
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.messages import connect_ranks
from ckpt_tasks.training.ranks.policy import AgreedPolicy, agreed_policy
from ckpt_tasks.types import Position, SaveDecision


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agreed(
    rank: int, world_size: int, port: int, **schedule: Any
) -> tuple[RankAgreement, AgreedPolicy]:
    store = connect_ranks("127.0.0.1", port, serve=rank == 0)
    agreement = RankAgreement(store, rank, world_size, seconds=30)
    policy = agreed_policy(ScheduleConfig(**schedule), agreement, is_busy=lambda: False)
    return agreement, policy


def context(boundary: Any, step: int, epoch: int = 0, **how: Any) -> SaveContext:
    phase: Any = "in_epoch" if boundary == "step" else "epoch_done"
    return SaveContext(
        boundary=boundary,
        position=Position(epoch, step, phase),
        saved_step=0,
        seconds_since_save=how.pop("seconds_since_save", 0.0),
        **how,
    )


def signalled_training(rank: int, world_size: int, port: int, on_rank: int) -> Any:
    """DDP, whose all-reduce keeps ranks in step; one rank gets a SIGTERM in its midst."""
    agreement, policy = agreed(rank, world_size, port, every_steps=25)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    items, saved = made("ddp", world_size), []
    for step in range(1, 2000):
        train(items["model"], items["optimizer"], 1, first=step)
        if step == 60 and rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        decision = policy.should_save(context("step", step, signalled=bool(stop)))
        if decision is not None:
            assert policy.save is not None
            saved.append((step, decision.trigger, policy.save.number))
            if decision.trigger == "signal":
                break
    torch.distributed.barrier()
    agreement.close()
    return saved


def test_a_signal_on_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    """A rank that stopped by itself would leave the others in the all-reduce for ever."""
    for on_rank in (0, 2):
        results = run_world(3, signalled_training, tmp_path, free_port(), on_rank, seconds=60)
        assert results == [results[0]] * 3
        assert results[0][:2] == [(25, "steps", 1), (50, "steps", 2)]
        step, trigger, number = results[0][-1]
        assert trigger == "signal"
        assert step > 60
        assert number == len(results[0])


def apart(rank: int, world_size: int, port: int) -> Any:
    """No collectives: ranks run as far apart as they like, and have different amounts of data."""
    agreement, policy = agreed(rank, world_size, port, every=0.05, every_epochs=1)
    saved, began = [], time.monotonic()
    for epoch in range(2):
        for step in range(1, (300, 400, 200)[rank] + 1):
            time.sleep((0.0005, 0.0001, 0.001)[rank])
            since = time.monotonic() - began
            decision = policy.should_save(
                context("step", 1000 * epoch + step, epoch, seconds_since_save=since)
            )
            if decision is not None:
                began = time.monotonic()
                saved.append((epoch, step, policy.save))
        end: Any = "end" if epoch else "epoch"
        policy.should_save(context(end, 1000 * (epoch + 1), epoch))
        saved.append((epoch, end, policy.save))
    torch.distributed.barrier()
    agreement.close()
    return saved


def test_ranks_that_run_apart_agree_and_end(tmp_path: Path) -> None:
    """One is much faster, another's data end first: the ends are saved by all, under one number.

    A save that was agreed for a step which a rank never came to is missed by that rank alone.
    """
    results = run_world(3, apart, tmp_path, free_port(), seconds=60)
    ends = [[entry for entry in result if isinstance(entry[1], str)] for result in results]
    assert ends[0] == ends[1] == ends[2]
    assert [save is not None and save.trigger for *_, save in ends[0]] == ["epoch", "final"]
    between = [{entry for entry in result if isinstance(entry[1], int)} for result in results]
    common = set.intersection(*between)
    for of_rank in between:
        assert len(of_rank - common) <= 2, "more saves missed than epochs ended early"


def one_late(rank: int, world_size: int, root: Path, port: int, failing: bool) -> Any:
    """Rank 1 takes its time to write, or fails and says so."""
    told: list[str] = []
    store = connect_ranks("127.0.0.1", port, serve=rank == 0)
    agreement = RankAgreement(
        store, rank, world_size, seconds=3, on_failure=lambda number, why: told.append(why)
    )
    items = made("fsdp", world_size)
    train(items["model"], items["optimizer"], 1)
    save = agreement.meet("end", SaveDecision("final", "training ended"), last=True)
    assert save is not None
    saver = RankSaver(root, rank, world_size, partial(agreement.tell_all, f"plan/{save.number}"))
    saver.failure = lambda: told[0] if told else None
    checkpoint, problem = None, ""
    if rank == 1:
        time.sleep(0.5)
    if rank == 1 and failing:
        agreement.tell_failure(save.number, "disk full")
    else:
        try:
            checkpoint = saver.save(items, seconds=60)
        except StoreError as error:
            problem = str(error)
    state = full_states(items)
    agreement.close()
    return checkpoint, problem, state


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    """The commit comes when its part is durable; plans were exchanged through the store."""
    root = tmp_path / "store"
    checkpoint, _, expected = run_world(3, one_late, tmp_path, root, free_port(), False)[0]
    for state in run_world(1, load_plain, tmp_path, root, checkpoint):
        assert same(state, expected)


def test_a_rank_that_says_it_failed_is_not_waited_for(tmp_path: Path) -> None:
    """Nothing is committed, long before the time is up in which its part might come."""
    results = run_world(3, one_late, tmp_path, tmp_path / "store", free_port(), True, seconds=45)
    assert "is missing (rank 1: disk full)" in results[0][1]


def load_plain(rank: int, world_size: int, root: Path, checkpoint: Any) -> Any:
    items = made("plain", world_size)
    restore(root, checkpoint, items, rank, world_size)
    return full_states(items)
