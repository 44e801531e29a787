"""Hyperparameters that are no plain values are recorded the same in every attempt."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import Event, Warned
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.hyperparameters import changed_hyperparameters, recorded_hyperparameters
from ckpt_tasks.training.run import TrainingRun
from ckpt_tasks.training.spec import TrainSpec


class Augmentation:
    """An object with Python's own `repr`, which holds its address."""


class Broken:
    """An object whose `repr` cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError("not yet")


class Mode(enum.Enum):
    FAST = "fast"


def halve(value: float) -> float:
    return value / 2


def _recorded(value: Any) -> Any:
    def train(run: object, option: Any = value) -> None: ...

    return recorded_hyperparameters(train, {})["option"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Augmentation, f"<{__name__}.Augmentation object>"),
        (lambda: halve, f"{__name__}.halve"),
        (lambda: Augmentation, f"{__name__}.Augmentation"),
        (lambda: len, "len"),
        (lambda: functools.partial(halve, 2), "functools.partial(<function halve>, 2)"),
        (lambda: [Augmentation()], f'["<{__name__}.Augmentation object>"]'),
        (lambda: ("a", 1), '["a",1]'),
        (lambda: {"b", "a"}, '["a","b"]'),
        (Broken, f"<{__name__}.Broken>"),
        (lambda: Mode.FAST, "<Mode.FAST: 'fast'>"),
        (lambda: nn.ReLU(), "ReLU()"),
        (lambda: "text at 0x7f00", "text at 0x7f00"),
        (lambda: None, None),
        (lambda: True, True),
        (lambda: 0.1, 0.1),
    ],
)
def test_a_value_is_recorded_without_what_differs(
    make: Callable[[], Any], expected: object
) -> None:
    """No address, and no order that hashing decides; a text and a plain value stay as they are."""
    assert _recorded(make()) == expected


def test_objects_in_a_mapping_are_recorded_likewise() -> None:
    """However deep they lie."""

    def train(run: object, options: Any = None) -> None: ...

    options = {"augment": {"first": Augmentation()}}
    assert recorded_hyperparameters(train, {"options": options}) == {
        "options.augment.first": f"<{__name__}.Augmentation object>"
    }


def test_given_values_win_over_defaults_and_secrets_are_masked() -> None:
    """What is recorded is what the training was called with."""

    def train(run: object, lr: float = 0.1, epochs: int = 3, api_key: str = "k") -> None: ...

    assert recorded_hyperparameters(train, {"lr": 0.2}) == {
        "lr": 0.2,
        "epochs": 3,
        "api_key": "***",
    }


_PROGRAM = """
from ckpt_tasks.training.hyperparameters import recorded_hyperparameters

class Thing: ...

def train(run, names=frozenset({"one", "two", "three"}), thing=Thing(), hook=lambda: None): ...

print(recorded_hyperparameters(train, {}))
"""


def test_another_process_records_the_same() -> None:
    """Also one that hashes texts in another way."""
    told = {
        subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
    assert "0x" not in told.pop()


def test_changes_are_told_by_name_with_both_values() -> None:
    """Changed, new and missing ones; a long value is cut, and equal ones are not named."""
    before = {"lr": 0.003, "name": "a" * 200, "key": "***", "old": None, "epochs": 3}
    today = {"lr": 0.01, "name": "b", "key": "***", "epochs": 3, "width": 8}

    told = changed_hyperparameters(before, today)

    assert told is not None
    said, _, advice = told.partition(". What was restored ")
    assert said.removeprefix("hyperparameters differ from the checkpoint's: ").split("; ") == [
        "lr was 0.003 and is 0.01 now",
        f"name was '{'a' * 79}... and is 'b' now",
        "width is new: 8",
        "old was None and is gone",
    ]
    assert "keeps the old value: set it after track()" in advice


def test_what_has_not_changed_is_not_told() -> None:
    """A type that means the same number is no change."""
    assert changed_hyperparameters({"lr": 1}, {"lr": 1.0}) is None


def test_a_resume_with_another_learning_rate_is_warned_of_once() -> None:
    """The restored optimizer keeps the old rate; the attempt after that is not warned again."""
    rates: list[float] = []

    def train(run: TrainingRun, lr: float) -> None:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
        run.track(optimizer=optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in run.epochs(3):
            if run.epoch == run.attempt:
                raise RuntimeError("dies")

    def attempt(lr: float) -> list[str]:
        events: list[Event] = []
        spec = TrainSpec(
            entrypoint="tests:train",
            run="changed",
            params={"lr": lr},
            invocation="one",
            config=CheckpointConfig(
                store=StoreConfig(url="memory://changed"), schedule=ScheduleConfig(every_epochs=1)
            ),
        )
        with contextlib.suppress(RuntimeError):
            AttemptRunner(spec, events.append).execute(train)
        return [event.message for event in events if isinstance(event, Warned)]

    assert attempt(0.003) == []
    (told,) = attempt(0.01)
    assert "lr was 0.003 and is 0.01 now" in told
    assert attempt(0.01) == []
    assert rates == [0.003, 0.003, 0.003]
