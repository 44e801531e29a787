"""SIGKILL at unannounced moments: every run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
from support.attempt_forks import AttemptForks, Kill
from support.launches import TOY, launched
from support.published import check_published, note_of, with_registry
from support.run_checks import check_run
from support.toy_runs import STEPS, Digest, toy_spec

from ckpt_tasks.events import Progress
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED

KILLS = int(os.environ.get("CKPT_TASKS_RANDOM_KILLS", "25"))
"""How many there are of each kind; ``make test-faults`` makes many more."""


def _random_kill(chooser: random.Random, done: int) -> Kill:
    """In one of the steps left, or somewhere in one of the saves left."""
    if chooser.random() < 0.5:
        return Kill(step=chooser.randrange(done, STEPS))
    left = 1 + (STEPS - done) // 5
    delay = chooser.uniform(0.0, 0.008)  # about what a save takes
    return Kill(event="SaveStarted", nth=chooser.randint(1, left), delay=delay)


@pytest.mark.parametrize("has_writer", [False, True], ids=["writes itself", "writer"])
def test_ends_bit_identical_when_killed_at_random_moments(
    has_writer: bool,
    root: Path,
    forks: AttemptForks,
    digest: Digest,
    expected_digest: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Attempts killed one to three times, retried until done, make the uninterrupted run's end."""
    kills = 0
    for seed in itertools.count():
        if kills >= KILLS:
            break
        spec = toy_spec(root / f"{seed}")
        chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
        done = 0
        for _ in range(chooser.randint(1, 3)):
            kill = _random_kill(chooser, done)
            options = {"environment": digest.environment, "has_writer": has_writer}
            if not forks.run(spec, kill=kill, **options).killed:
                break  # it ended within the delay
            kills += 1
            committed = check_run(spec, may_come_late=has_writer)
            done = committed[-1].step if committed else 0
            if done == STEPS:
                break
        fork = forks.run(spec, **options)
        assert fork.outcome.code == EXIT_DONE, f"seed {seed}: {fork.output}"
        assert digest.read() == expected_digest, f"seed {seed}"
        check_run(spec, steps=STEPS, may_come_late=has_writer)
        digest.path.unlink()
        shutil.rmtree(root)
    record_property("kills", kills)


@pytest.mark.parametrize(
    "seed", [20, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(21, 40))]
)
def test_each_start_is_registered_when_killed_at_random_moments(
    seed: int,
    spec: TrainSpec,
    mlflow_database: str,
    digest: Digest,
    expected_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With MLflow: the trainer killed at moments that know nothing of saves or registrations."""
    chooser = random.Random(seed)  # noqa: S311 - reproducible, not secret
    by_file = msgspec.structs.replace(spec, entrypoint=f"{TOY}:train")
    registering = with_registry(by_file, mlflow_database)
    for name, value in digest.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    for step in sorted(chooser.sample(range(2, STEPS - 2), 2)):
        with launched(registering) as attempt:
            attempt.wait_for(Progress, partial(_is_beyond, step))
            time.sleep(chooser.uniform(0.0, 0.2))
            attempt.trainer.kill()
            assert attempt.outcome().code == EXIT_FAILED, attempt.output
    with launched(registering) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
    assert digest.read() == expected_digest
    check_run(spec, steps=STEPS)
    check_published(spec, mlflow_database)
    assert note_of(mlflow_database).count("| SIGKILL, step ") == 2


def _is_beyond(step: int, progress: Progress) -> bool:
    return progress.position.step >= step
