"""Signals, and saves that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import AttemptConfig, CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import AttemptResumed, CheckpointCommitted, Event
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_STOPPED


def spec(run: str) -> TrainSpec:
    return TrainSpec(
        entrypoint="tests:train",
        run=run,
        invocation="one",
        config=CheckpointConfig(
            store=StoreConfig(url="memory://stops"),
            schedule=ScheduleConfig(every_steps=100),
            attempt=AttemptConfig(without_commit=3),
        ),
    )


def execute(
    run: str, body: Callable[[TrainingRun, AttemptRunner, int], None]
) -> tuple[TrainOutcome, list[CheckpointCommitted], list[str]]:
    """Train 3 x 4 steps, calling `body` inside each; outcome, commits, and what was called."""
    commits: list[CheckpointCommitted] = []
    called: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointCommitted):
            commits.append(event)

    runner = AttemptRunner(spec(run), on_event)

    def train(training: TrainingRun) -> None:
        loader = StatefulDataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
        training.track(model=nn.Linear(1, 1), loader=loader)
        try:
            for _ in training.epochs(3):
                for _ in training.steps(loader):
                    body(training, runner, training.step + 1)
                called.append("epoch end")
        except Exception:
            called.append("except Exception")
            raise
        finally:
            called.append("finally")

    return runner.execute(train), commits, called


def test_a_signal_saves_at_the_next_boundary_and_unwinds() -> None:
    """The step in hand is finished, saved and nothing more is trained; `finally` blocks run."""

    def body(training: TrainingRun, runner: AttemptRunner, step: int) -> None:
        if step == 2:
            runner.request_stop("received SIGTERM")
        assert step <= 2

    outcome, commits, called = execute("signalled", body)

    assert outcome.code == EXIT_STOPPED
    assert [(c.position.step, c.trigger) for c in commits] == [(2, "signal")]
    assert called == ["finally"]


def test_a_signal_during_recovery_trains_nothing() -> None:
    """The checkpoint is what it was; a step more might outlast the grace."""
    runner: AttemptRunner

    def on_event(event: Event) -> None:
        if isinstance(event, AttemptResumed):
            runner.request_stop("received SIGTERM")

    def train(training: TrainingRun) -> None:
        raise AssertionError("stopped before it trains")

    runner = AttemptRunner(spec("early"), on_event)
    outcome = runner.execute(train)
    assert outcome.code == EXIT_STOPPED
    assert outcome.attempt == 1


def test_a_stopped_run_goes_on_behind_the_saved_step() -> None:
    """The next attempt trains each step that is left, once."""
    steps: list[int] = []

    def stop_at_seven(training: TrainingRun, runner: AttemptRunner, step: int) -> None:
        steps.append(step)
        if step == 7:
            runner.request_stop("received SIGTERM")

    assert execute("goes on", stop_at_seven)[0].code == EXIT_STOPPED
    outcome, _, _ = execute("goes on", lambda training, runner, step: steps.append(step))

    assert outcome.done
    assert steps == list(range(1, 13))


def test_a_user_who_swallows_everything_cannot_train_on() -> None:
    """A bare `except` around the stop does not turn it into a finished training."""

    def train(training: TrainingRun) -> None:
        loader = StatefulDataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
        training.track(loader=loader)
        for _ in training.epochs(2):
            try:
                for _ in training.steps(loader):
                    runner.request_stop("received SIGTERM")
            except BaseException:  # noqa: S112 - what a careless user writes
                continue

    runner = AttemptRunner(spec("swallowed"), lambda event: None)
    assert runner.execute(train).code == EXIT_STOPPED


def test_run_stop_ends_both_loops_and_is_remembered() -> None:
    """The epoch's last code runs, the run is complete, and a second call trains nothing."""

    def body(training: TrainingRun, runner: AttemptRunner, step: int) -> None:
        if step == 3:
            training.stop()

    outcome, commits, called = execute("stops itself", body)

    assert outcome.done
    assert called == ["epoch end", "finally"]
    assert commits[-1].position.step == 3
    again, _, called = execute("stops itself", body)
    assert again.done
    assert called == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_saves_nothing(error: BaseException) -> None:
    """A half-done step is torn, so what was saved before it is all that is kept."""
    commits: list[Any] = []

    def train(training: TrainingRun) -> None:
        loader = StatefulDataLoader(TensorDataset(torch.arange(8.0)), batch_size=2)
        training.track(loader=loader)
        for _ in training.epochs(1):
            for _ in training.steps(loader):
                if training.step == 2:
                    raise error

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointCommitted):
            commits.append(event)

    with pytest.raises(type(error)):
        AttemptRunner(spec(f"raises {type(error).__name__}"), on_event).execute(train)
    assert commits == []
