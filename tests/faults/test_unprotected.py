"""Saves that fail, one after the other: training goes on, and not for ever."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from support.attempt_forks import AttemptForks, Kill, StoreFault
from support.run_checks import check_run
from support.toy_runs import STEPS

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.events import CheckpointCommitted, SaveFailed
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED


def test_saves_that_fail_for_too_long_end_the_attempt(
    spec: TrainSpec, forks: AttemptForks, finish: Callable[[TrainSpec], None]
) -> None:
    """Unprotected for longer than allowed, the attempt ends retryably; the retry loses nothing."""
    attempt = msgspec.structs.replace(spec.config.attempt, max_unprotected=0.2)
    config = msgspec.structs.replace(spec.config, attempt=attempt)
    fork = forks.run(
        msgspec.structs.replace(spec, config=config),
        faults=[StoreFault(at=3, times=10_000)],
        counted=["write"],
        environment={"TOY_STEP_SECONDS": "0.05"},
    )
    assert fork.outcome.code == EXIT_FAILED
    assert "no new checkpoint" in fork.outcome.message
    assert fork.outcome.position is not None
    assert fork.outcome.position.step < STEPS
    assert fork.events_of(SaveFailed)
    finish(spec)
    check_run(spec, steps=STEPS)


def _only_at_the_end(spec: TrainSpec) -> TrainSpec:
    config = msgspec.structs.replace(spec.config, schedule=ScheduleConfig())
    return msgspec.structs.replace(spec, config=config)


def test_a_store_that_fails_at_the_end_costs_no_attempt(
    spec: TrainSpec, forks: AttemptForks
) -> None:
    """The only save of a training, its last, is tried until the store answers again."""
    fork = forks.run(_only_at_the_end(spec), faults=[StoreFault(at=1, times=2)], counted=["write"])
    assert fork.outcome.code == EXIT_DONE, fork.output
    assert len(fork.events_of(SaveFailed)) == 2
    (committed,) = fork.events_of(CheckpointCommitted)
    assert committed.trigger == "final"
    check_run(spec, steps=STEPS)


def test_a_store_that_fails_at_a_signal_costs_no_work(
    spec: TrainSpec, forks: AttemptForks, finish: Callable[[TrainSpec], None]
) -> None:
    """What a preempted training asks to be saved is tried again within the grace."""
    fork = forks.run(
        _only_at_the_end(spec),
        faults=[StoreFault(at=1, times=2)],
        counted=["write"],
        kill=Kill(step=7, signal="SIGTERM"),
    )
    assert fork.outcome.code == EXIT_STOPPED, fork.output
    assert len(fork.events_of(SaveFailed)) == 2
    (committed,) = fork.events_of(CheckpointCommitted)
    assert committed.trigger == "signal"
    finish(spec)
    check_run(spec, steps=STEPS)
