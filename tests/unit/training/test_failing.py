"""How failures of saves are told and tried again, one after the other."""

from __future__ import annotations

import pytest

from ckpt_tasks.errors import NoSpaceError, StoreError
from ckpt_tasks.training.failing import Failing
from ckpt_tasks.types import SaveDecision

DECISION = SaveDecision("steps", "every 5 steps")


def follow(before: Failing | None, error: StoreError, *, makes_room: bool = False) -> Failing:
    return Failing.following(
        before, error, DECISION, begun=7.0, now=8.0, pause=90.0, makes_room=makes_room
    )


def test_the_first_of_a_kind_is_told_and_then_each_tenth() -> None:
    """One line when it begins, few while it lasts, one more where the cause has changed."""
    told, failing = [], None
    for number in range(1, 26):
        error = StoreError("gone") if number < 15 else NoSpaceError("full")
        failing = follow(failing, error)
        told += [] if failing.again else [number]
    assert told == [1, 10, 15, 20]
    assert failing is not None
    assert (failing.count, failing.since) == (25, 7.0)


@pytest.mark.parametrize(
    ("error", "makes_room", "pauses"),
    [
        (NoSpaceError("full"), True, [5.0, 90.0]),
        (NoSpaceError("full"), False, [90.0, 90.0]),
        (StoreError("gone"), True, [90.0, 90.0]),
    ],
)
def test_where_room_is_made_the_second_try_comes_soon(
    error: StoreError, makes_room: bool, pauses: list[float]
) -> None:
    """Once, and only where removing something could help."""
    first = follow(None, error, makes_room=makes_room)
    second = follow(first, error, makes_room=makes_room)
    assert [first.retry_at - 8.0, second.retry_at - 8.0] == pauses
    assert first.may_find_room is isinstance(error, NoSpaceError)
    assert not second.may_find_room
