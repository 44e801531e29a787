"""The sentence that says why an attempt starts where it does is true, also after a fallback."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.made_runs import MadeAttempt, MadeRun

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.recovery.recover import RecoveryPreview, preview_recovery
from ckpt_tasks.types import CheckpointId

Spoil = Callable[[MadeRun, CheckpointId], None]

NEWEST = "the newest checkpoint of the run's lineage"
USABLE = "the newest usable checkpoint of the run's lineage ({} passed over)"


@pytest.fixture
def run() -> MadeRun:
    """A run in memory."""
    return MadeRun()


def _damage(run: MadeRun, checkpoint: CheckpointId) -> None:
    run.damage(run.tensors_path(checkpoint))


def _quarantine(run: MadeRun, checkpoint: CheckpointId) -> None:
    mark(run.store, run.layout, "quarantined", checkpoint, why="bits", by="a test")


def _kill_attempts(run: MadeRun, checkpoint: CheckpointId) -> None:
    for _ in range(3):
        run.fail(run.begin().number, step=31)


def _spare(run: MadeRun, checkpoint: CheckpointId) -> None:
    """Nothing is wrong with it."""


def _preview(run: MadeRun) -> RecoveryPreview:
    attempts = read_attempts(run.store, run.layout)
    return preview_recovery(run.store, run.layout, run.identity, attempts, invocation="flow-run-1")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_spare, NEWEST),
        (_damage, USABLE.format(1)),
        (_quarantine, USABLE.format(1)),
        (_kill_attempts, USABLE.format(1)),
    ],
)
def test_the_reason_of_a_fallback(run: MadeRun, spoil: Spoil, why: str) -> None:
    """It is not called the newest where a newer one was passed over, in the preview neither."""
    first = run.begin()
    first.save(10)
    spoil(run, first.save(20))
    assert _preview(run).why == why
    assert run.begin().recovered.resumed.why == why


def test_all_that_were_passed_over_are_counted(run: MadeRun) -> None:
    """Marked before, found damaged now, and unhealthy; newest first."""
    first = run.begin()
    older = first.save(10)
    marked, damaged = first.save(20), first.save(30)
    unhealthy = first.save(40, nonfinite=["model.weight"])
    _quarantine(run, marked)
    _damage(run, damaged)
    preview = _preview(run)
    assert preview.why == USABLE.format(3)
    second: MadeAttempt = run.begin()
    assert second.start == str(older)
    assert second.recovered.resumed.why == USABLE.format(3)
    for passed_over in (preview.passed_over, second.recovered.resumed.passed_over):
        assert [p.checkpoint for p in passed_over] == [str(unhealthy), str(damaged), str(marked)]


def test_a_last_resort_that_fails_is_counted_once(run: MadeRun) -> None:
    """The newest, passed over for its failures, is tried at last; it may be damaged as well."""
    first = run.begin()
    damaged = first.save(10), first.save(20)
    _kill_attempts(run, damaged[1])
    for checkpoint in damaged:
        _damage(run, checkpoint)
    with pytest.raises(CheckpointNotFoundError, match="none of the 2 checkpoints"):
        run.begin()


def test_a_last_resort(run: MadeRun) -> None:
    """Where all others are damaged the newest is started from after all, and these passed over."""
    first = run.begin()
    damaged, deadly = first.save(10), first.save(20)
    _kill_attempts(run, deadly)
    _damage(run, damaged)
    second = run.begin()
    assert second.start == str(deadly)
    assert [p.checkpoint for p in second.recovered.resumed.passed_over] == [str(damaged)]
    assert second.recovered.resumed.why == USABLE.format(1)


def test_a_checkpoint_asked_for_is_no_fallback(run: MadeRun) -> None:
    """The reason is who asked, whatever is newer."""
    first = run.begin()
    asked = first.save(10)
    _quarantine(run, first.save(20))
    second = run.begin("flow-run-2", resume=str(asked))
    assert second.recovered.resumed.why == "this checkpoint was asked for"
