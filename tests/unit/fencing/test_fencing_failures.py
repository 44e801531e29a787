"""When failures count as the same, and what follows: the rule by itself."""

from __future__ import annotations

import pytest

from ckpt_tasks.fencing.failures import Ending, repeated_failure
from ckpt_tasks.format.records import Failure
from ckpt_tasks.types import CheckpointId

BAD = Failure(kind="ValueError: bad", step=31)
OTHER = Failure(kind="SIGKILL", step=31)
LATER = Failure(kind="ValueError: bad", step=32)
NEWEST, OLDER = CheckpointId(30, 1, 3), CheckpointId(20, 1, 2)


def _end(
    failure: Failure | None = BAD,
    *,
    start: CheckpointId | None = NEWEST,
    committed: int = -1,
) -> Ending:
    return Ending(started_from=start, committed_step=committed, failure=failure)


@pytest.mark.parametrize(
    "endings",
    [
        [],
        [_end()],
        [_end(), _end()],
        [_end(None), _end(None), _end(None), _end(None)],
        [_end(), _end(), _end(), _end(None)],
        [_end(), _end(LATER), _end(), _end(LATER), _end(Failure(kind="ValueError: bad", step=33))],
        [_end(), _end(OTHER), _end(), _end(OTHER)],
        [_end(), _end(), _end(committed=32, failure=None), _end()],
        [_end(), _end(), _end(LATER, committed=32), _end(), _end()],
    ],
    ids=[
        "no attempt",
        "once",
        "twice",
        "unknown each time",
        "the newest unknown",
        "other steps",
        "two kinds, twice each",
        "got past it",
        "got past it and failed there",
    ],
)
def test_too_little_in_common(endings: list[Ending]) -> None:
    """These are no sign that the same thing happens again and again."""
    assert repeated_failure(endings) is None


@pytest.mark.parametrize(
    "endings",
    [
        [_end(), _end(), _end()],
        [_end(start=None, committed=30), _end(), _end()],
        [_end(), _end(None), _end(OTHER), _end(), _end(None), _end()],
        [_end(committed=31), _end(committed=31), _end(committed=31)],
        [_end(), _end(None, committed=32), _end(), _end(), _end()],
    ],
    ids=[
        "in a row",
        "one from the beginning",
        "with others between",
        "committed at that step",
        "since it got past it",
    ],
)
def test_the_same_failure_three_times(endings: list[Ending]) -> None:
    """Whatever lies between them, three times the same at one step is one too many."""
    repeated = repeated_failure(endings)
    assert repeated is not None
    assert (repeated.failure, repeated.times, repeated.gone_back) == (BAD, 3, False)
    assert str(repeated) == "3 attempts ended at step 31 with ValueError: bad"


@pytest.mark.parametrize(
    "after",
    [
        [_end(start=OLDER)],
        [_end(None, start=OLDER), _end(start=OLDER)],
        [_end(None, start=OLDER, committed=30), _end(start=CheckpointId(30, 5, 1))],
        [_end(start=None)],
    ],
    ids=["from there", "preempted first", "committed and preempted first", "from the beginning"],
)
def test_again_after_going_back(after: list[Ending]) -> None:
    """An older checkpoint was tried and the same failure came again: no other will help."""
    repeated = repeated_failure([_end(), _end(), _end(), *after])
    assert repeated is not None
    assert (repeated.times, repeated.gone_back) == (4, True)


def test_a_lost_machine_after_going_back_goes_back_no_further() -> None:
    """Nothing is known of the newest end, so the run goes on from wherever it is."""
    assert repeated_failure([_end(), _end(), _end(), _end(None, start=OLDER)]) is None


def test_another_failure_after_going_back_begins_anew() -> None:
    """What fails elsewhere once is tried again from the same place."""
    assert repeated_failure([_end(), _end(), _end(), _end(LATER, start=OLDER)]) is None


@pytest.mark.parametrize(
    "endings",
    [
        [_end()] * 4,
        [_end(), _end(), _end(start=OLDER), _end(start=OLDER)],
        [_end(), _end(), _end(None, start=OLDER), _end(), _end()],
    ],
    ids=["never", "for the third", "between"],
)
def test_without_an_older_checkpoint_it_stays_worth_a_try(endings: list[Ending]) -> None:
    """As long as nothing older was started from since the third, only the cap on attempts ends
    it: before that, something else had made them go back.
    """
    repeated = repeated_failure(endings)
    assert repeated is not None
    assert (repeated.times, repeated.gone_back) == (4, False)
