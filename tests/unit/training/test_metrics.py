"""The metric buffer: one value per key and step, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.training.metrics import JOURNAL_ROWS, MetricBuffer


@pytest.fixture
def buffer() -> MetricBuffer:
    return MetricBuffer()


def _sent(buffer: MetricBuffer) -> list[tuple[str, Any, int]]:
    """Rows without their times."""
    return [(key, value, step) for key, value, step, _ in buffer.drain()]


def test_values_get_the_step_that_is_closed(buffer: MetricBuffer) -> None:
    """What is logged belongs to the step under way, whose number is known at its end."""
    buffer.log({"loss": 2.0})
    assert _sent(buffer) == []
    assert buffer.close_step(1) == []
    buffer.log({"loss": 1.0, "lr": 0.1})
    buffer.close_step(2)
    assert _sent(buffer) == [("loss", 2.0, 1), ("loss", 1.0, 2), ("lr", 0.1, 2)]
    assert _sent(buffer) == []


def test_a_key_given_twice_in_a_step_keeps_its_last_value(buffer: MetricBuffer) -> None:
    """Nothing has been sent yet, so the later one is the better one."""
    buffer.log({"loss": 2.0})
    buffer.log({"loss": 1.0})
    buffer.close_step(1)
    assert _sent(buffer) == [("loss", 1.0, 1)]


def test_a_key_whose_step_is_closed_keeps_its_first_value(buffer: MetricBuffer) -> None:
    """A second value for one step is dropped, and named; other keys are taken."""
    buffer.log({"loss": 2.0})
    buffer.close_step(1)
    buffer.log({"loss": 1.0, "accuracy": 0.5})
    assert buffer.close_step(1) == ["loss"]
    assert _sent(buffer) == [("loss", 2.0, 1), ("accuracy", 0.5, 1)]
    assert buffer.logged == ["accuracy", "loss"]


def test_open_values_can_be_forgotten(buffer: MetricBuffer) -> None:
    """What code that runs again logs is not logged again."""
    buffer.log({"loss": 2.0})
    buffer.discard_open()
    buffer.close_step(1)
    assert _sent(buffer) == []
    assert buffer.logged == []


def test_a_record_has_the_values_of_its_own_step(buffer: MetricBuffer) -> None:
    """What was logged for the step that was closed last, as records can hold it, and no older
    value, whenever rows are sent.
    """
    buffer.log({"val_loss": 3.0, "old": 1.0})
    buffer.close_step(1)
    buffer.drain()
    assert buffer.of_step == {"val_loss": 3.0, "old": 1.0}
    buffer.log({"val_loss": 2.0})
    buffer.close_step(2)
    buffer.log({"a": 1.0, "b": math.inf, "c": -math.inf, "d": math.nan})
    buffer.close_step(3)
    assert buffer.of_step == {}
    buffer.drain()
    assert buffer.of_step == {"a": 1.0, "b": "inf", "c": "-inf", "d": "nan"}
    buffer.close_step(4)
    buffer.drain()
    assert buffer.of_step == {}


def test_a_record_has_what_was_logged_behind_its_step(buffer: MetricBuffer) -> None:
    """An epoch's last code logs for the step before it: its save holds both."""
    buffer.log({"loss": 2.0})
    buffer.close_step(20)
    buffer.drain()
    buffer.log({"val_loss": 3.0})
    buffer.close_step(20)
    buffer.drain()
    assert buffer.of_step == {"loss": 2.0, "val_loss": 3.0}


def test_the_values_of_a_record_are_limited(buffer: MetricBuffer) -> None:
    """A commit record is small: further keys are sent, and not recorded."""
    buffer.log({f"key-{number:03d}": 1 for number in range(501)})
    buffer.close_step(1)
    assert len(_sent(buffer)) == 501
    assert len(buffer.of_step) == 500


def test_the_journal_holds_what_no_checkpoint_holds(buffer: MetricBuffer) -> None:
    """Rows sent since the last one, until the next."""
    buffer.log({"loss": 2.0})
    buffer.close_step(1)
    rows = buffer.drain()
    assert buffer.journal() == rows
    buffer.forget_journal()
    assert buffer.journal() == []


def test_a_journal_that_is_too_long_says_so(buffer: MetricBuffer) -> None:
    """Up to its limit it holds all; beyond it the newest, and that the others are not in it."""
    for step in range(1, JOURNAL_ROWS + 1):
        buffer.log({"loss": 1.0})
        buffer.close_step(step)
    buffer.drain()
    assert not buffer.has_overflowed
    assert len(buffer.journal()) == JOURNAL_ROWS
    buffer.log({"loss": 1.0})
    buffer.close_step(JOURNAL_ROWS + 1)
    buffer.drain()
    assert buffer.has_overflowed
    assert [buffer.journal()[n][2] for n in (0, -1)] == [2, JOURNAL_ROWS + 1]


def test_a_restored_buffer_knows_what_was_logged(buffer: MetricBuffer) -> None:
    """A value for the checkpoint's own step is not logged again; its record had them all."""
    buffer.restore({"loss": 2.0, "lr": 0.1}, 7, ["loss"])
    buffer.log({"loss": 9.0, "late": 1.0})
    assert buffer.close_step(7) == ["loss"]
    assert _sent(buffer) == [("late", 1.0, 7)]
    assert buffer.of_step == {"loss": 2.0, "lr": 0.1, "late": 1.0}
    buffer.log({"loss": 1.0})
    assert buffer.close_step(8) == []
    buffer.drain()
    assert buffer.of_step == {"loss": 1.0}


@pytest.mark.parametrize(
    "value",
    [3, 3.0, True, np.float32(3), np.int64(3), torch.tensor(3.0), torch.tensor([[3]])],
    ids=repr,
)
def test_numbers_of_all_kinds(buffer: MetricBuffer, value: Any) -> None:
    """Whatever is one number is taken as one."""
    buffer.log({"loss": value})
    buffer.close_step(1)
    ((_, sent, _),) = _sent(buffer)
    assert sent == float(value)
    assert type(sent) is float


def test_a_tensor_is_read_when_it_is_logged(buffer: MetricBuffer) -> None:
    """The user may go on adding to it, and its graph is not kept."""
    total = torch.tensor(1.0, requires_grad=True)
    running = total.detach()
    buffer.log({"loss": running})
    running += 1
    buffer.close_step(1)
    assert _sent(buffer) == [("loss", 1.0, 1)]


@pytest.mark.parametrize(
    "value",
    ["high", None, [1, 2], torch.ones(2), torch.tensor(1j), 10**400],
    ids=["text", "None", "list", "two elements", "complex", "an integer too large"],
)
def test_what_is_no_number_is_refused(buffer: MetricBuffer, value: Any) -> None:
    """At once, naming the key."""
    with pytest.raises(StateError, match="metric 'loss'"):
        buffer.log({"loss": value})
