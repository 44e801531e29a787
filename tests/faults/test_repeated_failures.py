"""Attempts that end in the same way again and again, as an orchestrator's retries meet them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support import toy_failing
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import SaveConfig, ScheduleConfig
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_USAGE

MAX_ATTEMPTS = 8


def _spec(root: Path, training: str) -> TrainSpec:
    spec = toy_spec(root, entrypoint=f"{toy_failing.__file__}:{training}", params={})
    config = msgspec.structs.replace(
        spec.config,
        schedule=ScheduleConfig(every_steps=5),
        save=SaveConfig(asynchronous=False),  # at just these steps
    )
    return msgspec.structs.replace(spec, config=config)


def _retry(spec: TrainSpec) -> list[TrainOutcome]:
    """Launch until it is done or not worth retrying, as an orchestrator does."""
    outcomes: list[TrainOutcome] = []
    while not outcomes or (outcomes[-1].retryable and len(outcomes) < MAX_ATTEMPTS):
        outcomes.append(launch(spec))
    return outcomes


def _attempts(spec: TrainSpec) -> list[AttemptView]:
    with open_store(spec.config.store) as store:
        return list(view_run(store, spec.run).attempts)


def _starts(attempts: list[AttemptView]) -> list[str | None]:
    return [attempt.resumed.checkpoint for attempt in attempts if attempt.resumed]


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ("poisoned", "3 attempts ended at step 11 with ValueError: bad state in <object object"),
        ("out_of_memory", "3 attempts ended at step 11 with SIGKILL"),
    ],
)
def test_a_checkpoint_from_which_all_fail_alike_is_passed_over(
    root: Path, training: str, why: str
) -> None:
    """After the third such end the next attempt starts from the older checkpoint, and finishes."""
    spec = _spec(root, training)
    outcomes = _retry(spec)
    assert [outcome.code for outcome in outcomes] == [EXIT_FAILED] * 3 + [EXIT_DONE], outcomes
    attempts = _attempts(spec)
    newest, older = "step-00000010-a1-s2", "step-00000005-a1-s1"
    assert _starts(attempts) == [None, newest, newest, older]
    last = attempts[-1].resumed
    assert last is not None
    (passed,) = last.passed_over
    assert passed.checkpoint == newest
    assert passed.why.startswith(why)
    position = outcomes[-1].position
    assert position is not None
    assert position.step == toy_failing.STEPS


def test_what_fails_from_an_older_checkpoint_too_fails_for_good(root: Path) -> None:
    """One step back, whose commits are no progress; then nothing is tried any more."""
    spec = _spec(root, "hopeless")
    outcomes = _retry(spec)
    assert [outcome.code for outcome in outcomes] == [EXIT_FAILED] * 4 + [EXIT_USAGE], outcomes
    assert "4 attempts ended at step 11" in outcomes[-1].message
    assert "also from an older checkpoint; not trying again" in outcomes[-1].message
    newest, older = "step-00000010-a1-s2", "step-00000005-a1-s1"
    assert _starts(_attempts(spec)) == [None, newest, newest, older]


def test_kills_at_different_steps_throw_no_work_away(root: Path) -> None:
    """Three preemptions before a commit: each retry goes on from the newest checkpoint."""
    spec = _spec(root, "preempted")
    outcomes = _retry(spec)
    assert [outcome.code for outcome in outcomes] == [EXIT_FAILED] * 3 + [EXIT_DONE], outcomes
    assert _starts(_attempts(spec)) == [None] + ["step-00000010-a1-s2"] * 3
