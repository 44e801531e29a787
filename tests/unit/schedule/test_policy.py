"""When a save is due."""

from __future__ import annotations

import pytest

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.schedule import (
    AnyOf,
    AtEnd,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    OnSignal,
    SaveContext,
    SaveDecisionPolicy,
    policy_from_config,
)
from ckpt_tasks.schedule.policy import Boundary
from ckpt_tasks.types import Phase, Position


def context(
    step: int = 0,
    *,
    epoch: int = 0,
    boundary: Boundary = "step",
    saved_step: int = 0,
    seconds: float = 0.0,
    signalled: bool = False,
) -> SaveContext:
    phase: Phase = "in_epoch" if boundary == "step" else "epoch_done"
    return SaveContext(
        boundary=boundary,
        position=Position(epoch, step, phase),
        saved_step=saved_step,
        seconds_since_save=seconds,
        signalled=signalled,
    )


def steps_saved(policy: SaveDecisionPolicy, start: int, stop: int) -> list[int]:
    """Steps after which `policy` saves in an attempt that starts at step `start`."""
    saved, found = start, []
    for step in range(start + 1, stop + 1):
        if policy.should_save(context(step, saved_step=saved)) is not None:
            saved = step
            found.append(step)
    return found


@pytest.mark.parametrize("start", [0, 4, 5, 9, 10])
def test_a_resumed_run_saves_where_an_uninterrupted_one_does(start: int) -> None:
    """Every n steps means multiples of n, wherever the attempt began."""
    uninterrupted = steps_saved(EverySteps(5), 0, 30)
    assert uninterrupted == [5, 10, 15, 20, 25, 30]
    assert steps_saved(EverySteps(5), start, 30) == [s for s in uninterrupted if s > start]


def test_a_multiple_that_went_by_is_made_up_for() -> None:
    """After a `break` the next boundary may lie behind the multiple; the save is made there."""
    decision = EverySteps(5).should_save(context(7, boundary="epoch", saved_step=4))
    assert decision is not None
    assert decision.trigger == "steps"
    assert EverySteps(5).should_save(context(9, saved_step=7)) is None


def test_epochs_count_at_their_ends_only() -> None:
    """Every second epoch is saved behind the epochs 1, 3, 5, and never between steps."""
    policy = EveryEpochs(2)
    ends = [e for e in range(6) if policy.should_save(context(epoch=e, boundary="epoch"))]
    assert ends == [1, 3, 5]
    assert policy.should_save(context(epoch=1, boundary="step")) is None
    assert policy.should_save(context(epoch=1, boundary="end")) is not None


def test_seconds_count_from_the_latest_checkpoint() -> None:
    """The first boundary at which enough time has passed is taken."""
    policy = EverySeconds(60.0)
    assert policy.should_save(context(3, seconds=59.9)) is None
    decision = policy.should_save(context(3, seconds=60.0))
    assert decision is not None
    assert (decision.trigger, decision.reason) == ("duration", "every 60 s")


def test_any_of_tells_the_first_reason() -> None:
    """The order of the policies decides which reason is told, not whether a save is made."""
    both = context(5, signalled=True)
    told = [
        AnyOf(policies).should_save(both)
        for policies in ((OnSignal(), EverySteps(5)), (EverySteps(5), OnSignal()))
    ]
    assert [decision.trigger for decision in told if decision] == ["signal", "steps"]
    assert AnyOf(()).should_save(both) is None


@pytest.mark.parametrize(
    ("config", "due", "trigger"),
    [
        (ScheduleConfig(), context(boundary="end"), "final"),
        (ScheduleConfig(every_epochs=1), context(boundary="epoch"), "epoch"),
        (ScheduleConfig(every_steps=3), context(3), "steps"),
        (ScheduleConfig(every=1.5), context(1, seconds=2.0), "duration"),
        (ScheduleConfig(final=False), context(1, signalled=True), "signal"),
    ],
)
def test_a_configuration_is_a_policy(
    config: ScheduleConfig, due: SaveContext, trigger: str
) -> None:
    """Each key of the configuration makes its saves, and a signal always does."""
    decision = policy_from_config(config).should_save(due)
    assert decision is not None
    assert decision.trigger == trigger


def test_without_final_the_end_is_no_reason() -> None:
    """`final = false` and nothing else saves nothing."""
    assert (
        policy_from_config(ScheduleConfig(final=False)).should_save(context(boundary="end")) is None
    )
    assert AtEnd().should_save(context(boundary="end")) is not None
