"""Mistakes in a training function are told at once, with what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.errors import ConfigError, StateError
from ckpt_tasks.events import Event, Warned
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

SPEC = TrainSpec(
    entrypoint="tests:train",
    run="mistakes",
    invocation="one",
    config=CheckpointConfig(
        store=StoreConfig(url="memory://mistakes"), schedule=ScheduleConfig(every_steps=1)
    ),
)


def execute(train: Callable[[TrainingRun], Any]) -> TrainOutcome:
    return AttemptRunner(SPEC, lambda event: None).execute(train)


def loader() -> StatefulDataLoader:
    return StatefulDataLoader(TensorDataset(torch.arange(6.0)), batch_size=2)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class WithLambda:
    def state_dict(self) -> dict[str, Any]:
        return {"schedule": {"decay": lambda step: 0.9**step}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never saved, so never loaded")


def nested(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    for _ in run.epochs(1):
        for _ in run.steps(data):
            list(run.steps(data))


def twice_an_epoch(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    for _ in run.epochs(1):
        list(run.steps(data))
        list(run.steps(data))


def outside(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    list(run.steps(data))


def wrapped(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    for _ in run.epochs(1):
        list(run.steps(enumerate(data)))


def before_track(run: TrainingRun) -> None:
    list(run.epochs(1))


def late_track(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    for _ in run.epochs(1):
        run.track(model=nn.Linear(1, 1))


def double_track(run: TrainingRun) -> None:
    run.track(model=nn.Linear(1, 1))
    run.track(model=nn.Linear(1, 1))


def step_done_inside(run: TrainingRun) -> None:
    data = loader()
    run.track(loader=data)
    for _ in run.epochs(1):
        for _ in run.steps(data):
            run.step_done()


def negative(run: TrainingRun) -> None:
    run.track(loader=loader())
    list(run.epochs(-1))


def no_number(run: TrainingRun) -> None:
    run.track(model=nn.Linear(1, 1))
    run.log(loss="small")


def a_vector(run: TrainingRun) -> None:
    run.track(model=nn.Linear(1, 1))
    run.log(loss=torch.ones(3))


def unsavable(run: TrainingRun) -> None:
    run.track(schedule=WithLambda())


def irreproducible(run: TrainingRun) -> None:
    run.track(loader=DataLoader(Endless(), batch_size=2))


def without_track(run: TrainingRun) -> None:
    for batch in loader():
        assert batch is not None


def by_hand_without_a_position(run: TrainingRun) -> None:
    run.track(loader=DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2))
    run.step_done()


@pytest.mark.parametrize(
    ("train", "error", "says"),
    [
        (nested, ConfigError, "nested"),
        (twice_an_epoch, ConfigError, "twice in epoch 0"),
        (outside, ConfigError, "inside"),
        (wrapped, ConfigError, r"tqdm\(run.steps\(loader\)\)"),
        (before_track, ConfigError, "before run.track"),
        (late_track, StateError, "track"),
        (without_track, ConfigError, r"returned without run.track\(...\)"),
        (double_track, StateError, "called twice"),
        (step_done_inside, ConfigError, "inside run.steps"),
        (negative, ConfigError, "negative"),
        (no_number, StateError, "'loss' is no number"),
        (a_vector, StateError, "'loss' is a tensor of 3 elements"),
        (unsavable, StateError, "schedule.*function"),
        (irreproducible, StateError, "StatefulDataLoader"),
        (by_hand_without_a_position, ConfigError, "StatefulDataLoader"),
    ],
)
def test_a_mistake_is_told(
    train: Callable[[TrainingRun], None], error: type[Exception], says: str
) -> None:
    """The error is the user's to mend (exit code 2), and its message says how."""
    with pytest.raises(error, match=says) as caught:
        execute(train)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_state_made_by_the_first_step_is_tried_at_its_end() -> None:
    """What cannot be saved is found at the first boundary, not at the first save, hours later."""
    seen: list[int] = []

    def train(run: TrainingRun) -> None:
        data = loader()
        run.track(loader=data)
        for _ in run.epochs(1):
            for _ in run.steps(data):
                seen.append(run.step)
                run.state["callback"] = print

    spec = TrainSpec(entrypoint="t:t", run="lazy", invocation="one", config=SPEC.config)
    with pytest.raises(StateError, match="callback"):
        AttemptRunner(spec, lambda event: None).execute(train)
    assert seen == [0]


def test_names_that_differ_from_the_checkpoints_are_told_on_both_sides() -> None:
    """A resumed run that tracks other names stops and lists them; `rename` maps them."""

    def first(run: TrainingRun) -> None:
        run.track(model=nn.Linear(1, 1))
        run.step_done()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(first)

    with pytest.raises(StateError, match=r"model.*network|network.*model"):
        execute(lambda run: run.track(network=nn.Linear(1, 1)))
    outcome = execute(lambda run: run.track(network=nn.Linear(1, 1), rename={"model": "network"}))
    assert outcome.done


def test_a_run_without_track_is_not_complete() -> None:
    """Once it tracks, the same run trains."""
    spec = msgspec.structs.replace(SPEC, run="untracked")
    with pytest.raises(ConfigError, match=r"run\.track"):
        AttemptRunner(spec, lambda event: None).execute(without_track)

    outcome = AttemptRunner(spec, lambda event: None).execute(tracks_only)

    assert outcome.message.startswith("trained to its end")


def test_a_run_without_a_step_is_complete_and_told() -> None:
    """No epochs were asked for, perhaps; or there were no data, which people want to know."""
    events: list[Event] = []
    spec = msgspec.structs.replace(SPEC, run="stepless")

    outcome = AttemptRunner(spec, events.append).execute(tracks_only)

    assert outcome.done
    (told,) = [event.message for event in events if isinstance(event, Warned)]
    assert "without a step done" in told


def tracks_only(run: TrainingRun) -> None:
    run.track(model=nn.Linear(1, 1))


def test_early_stopping_as_documented_counts_on_in_the_next_attempt() -> None:
    """`TrainingRun.state` holds the best value and the epochs without a better one."""
    losses = [3.0, 2.0, 2.5, 2.5, 2.5, 1.0]
    seen: list[tuple[int, int]] = []

    def train(run: TrainingRun) -> None:
        run.state.update(best=math.inf, bad=0)
        run.track(model=nn.Linear(1, 1))
        for epoch in run.epochs(6):
            if (run.attempt, epoch) == (1, 3):
                raise RuntimeError("dies")
            loss = losses[epoch]
            run.state["bad"] = 0 if loss < run.state["best"] else run.state["bad"] + 1
            run.state["best"] = min(loss, run.state["best"])
            seen.append((epoch, run.state["bad"]))
            if run.state["bad"] >= 3:
                run.stop()

    config = CheckpointConfig(store=SPEC.config.store, schedule=ScheduleConfig(every_epochs=1))
    spec = msgspec.structs.replace(SPEC, run="early", config=config)
    with pytest.raises(RuntimeError, match="dies"):
        AttemptRunner(spec, lambda event: None).execute(train)
    AttemptRunner(spec, lambda event: None).execute(train)

    assert seen == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)]


def test_every_public_name_of_a_run_says_what_it_is() -> None:
    """`help(TrainingRun.state)` is where a newcomer looks."""
    public = [name for name in dir(TrainingRun) if not name.startswith("_")]
    assert {"state", "name", "attempt", "hyperparameters", "resumed_from"} <= set(public)
    assert [name for name in public if not getattr(TrainingRun, name).__doc__] == []
