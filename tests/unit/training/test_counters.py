"""Counters: where the loops are, and what comes next."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.types import Position


def test_a_new_run_is_in_its_first_epoch() -> None:
    """Before anything has been done, the first epoch is the one under way."""
    counters = Counters()
    assert counters.position == Position(0, 0, "in_epoch")
    assert counters.next_epoch() == 0
    assert not counters.is_over


def test_an_epoch_that_is_under_way_is_entered_again() -> None:
    """A resume in its midst keeps its number and its batches."""
    counters = Counters(epoch=2, step=20, batch=4)
    assert counters.next_epoch() == 2
    counters.begin_epoch()
    assert (counters.epoch, counters.batch, counters.looped) == (2, 4, True)


def test_an_epoch_that_is_done_is_followed_by_the_next() -> None:
    """Its batches are counted from the beginning; steps go on."""
    counters = Counters(epoch=2, step=24, phase="epoch_done", batch=8)
    assert counters.next_epoch() == 3
    counters.begin_epoch()
    assert counters.position == Position(3, 24, "in_epoch")
    assert counters.batch == 0


def test_a_step_in_flight_counts_at_the_end_of_its_epoch() -> None:
    """Once, and only if there is one."""
    counters = Counters(step=7, in_flight=True)
    counters.end_epoch()
    counters.end_epoch()
    assert counters.position == Position(0, 8, "epoch_done")
    assert not counters.in_flight


@pytest.mark.parametrize(
    ("state", "over"),
    [
        ({}, False),
        ({"finished": True}, True),
        ({"stopping": True}, False),
        ({"stopping": True, "phase": "epoch_done"}, True),
        ({"phase": "epoch_done"}, False),
    ],
)
def test_when_no_epoch_follows(state: dict[str, Any], over: bool) -> None:
    """A stop lets the epoch under way end; a finished run has none."""
    assert Counters(**state).is_over is over


def test_counters_come_back_as_they_were() -> None:
    """All of them, through plain values."""
    counters = Counters(
        epoch=3,
        step=31,
        phase="epoch_done",
        batch=7,
        in_flight=True,
        completes_step=False,
        stopping=True,
        finished=True,
        looped=True,
        logged=["loss"],
    )
    assert Counters.from_dict(counters.to_dict()) == counters


@pytest.mark.parametrize(
    "values",
    [None, [], {"epoch": "2"}, {"phase": "over"}, {"epochs": 2}, {"logged": [1]}],
    ids=repr,
)
def test_other_values_are_damage(values: Any) -> None:
    """A checkpoint whose counters are not counters is not gone on from."""
    with pytest.raises(CorruptCheckpointError, match="the checkpoint's counters are wrong"):
        Counters.from_dict(values)
