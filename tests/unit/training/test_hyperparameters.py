"""Hyperparameters that are no plain values are recorded the same in every attempt."""

from __future__ import annotations

import enum
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from ckpt_tasks.training.hyperparameters import recorded_hyperparameters


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
    ids=str,
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
