"""Saves that fail, one after the other: training goes on, and not for ever."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from support.attempt_forks import AttemptForks, StoreFault
from support.run_checks import check_run
from support.toy_runs import STEPS

from ckpt_tasks.events import SaveFailed
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_FAILED


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
