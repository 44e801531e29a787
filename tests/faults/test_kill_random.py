"""SIGKILL at unannounced moments: every run ends as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.attempt_forks import AttemptForks, Kill
from support.run_checks import check_run
from support.toy_runs import STEPS, Digest

from ckpt_tasks.training.spec import TrainSpec


def _random_kill(chooser: random.Random, done: int) -> Kill:
    """In one of the steps left, or somewhere in one of the saves left."""
    if chooser.random() < 0.5:
        return Kill(step=chooser.randrange(done, STEPS))
    left = 1 + (STEPS - done) // 5
    delay = chooser.uniform(0.0, 0.008)  # about what a save takes
    return Kill(event="SaveStarted", nth=chooser.randint(1, left), delay=delay)


@pytest.mark.parametrize("seed", range(20))
def test_ends_bit_identical_when_killed_at_random_steps(
    seed: int,
    spec: TrainSpec,
    forks: AttemptForks,
    digest: Digest,
    finish: Callable[[TrainSpec], None],
) -> None:
    """Attempts killed at random, retried until done, make the uninterrupted run's final state."""
    chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
    done = kills = 0
    for _ in range(chooser.randint(1, 3)):
        fork = forks.run(spec, kill=_random_kill(chooser, done), environment=digest.environment)
        if not fork.killed:
            break  # it ended within the delay
        kills += 1
        committed = check_run(spec)
        done = committed[-1].step if committed else 0
        if done == STEPS:
            break
    assert kills
    finish(spec)
    check_run(spec, steps=STEPS)
