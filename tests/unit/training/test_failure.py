"""What an attempt ended with, as later attempts compare it."""

from __future__ import annotations

import signal

import pytest

from ckpt_tasks.errors import CorruptCheckpointError, RunBusyError, StateError, StoreError
from ckpt_tasks.format.records import Failure
from ckpt_tasks.training.failure import (
    death_failure,
    exception_failure,
    message_of,
)
from ckpt_tasks.training.spec import TrainOutcome
from ckpt_tasks.types import Position

HERE = Position(1, 12)


class OutOfLuckError(Exception):
    """A user's own."""


def _kind(error: Exception) -> str:
    failure = exception_failure(error, HERE)
    assert failure is not None
    assert failure.step == 12
    return failure.kind


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "CUDA out of memory: 17 MiB free, process 4711",
            "CUDA out of memory: 3 MiB free, process 9",
        ),
        ("<lock at 0x7f01aab0>", "<lock at 0x7e99ccdd12>"),
        ("two\n  words", "two words"),
        ("s3://me:one@host/x", "s3://you:two@host/x"),
    ],
)
def test_what_differs_in_each_attempt_is_left_out(one: str, other: str) -> None:
    """Numbers, addresses, white space and credentials do not make two failures of one."""
    assert _kind(ValueError(one)) == _kind(ValueError(other))


def test_kinds_that_differ() -> None:
    """Another type or another message is another failure."""
    kinds = {_kind(error) for error in (ValueError("a"), ValueError("b"), OutOfLuckError("a"))}
    assert kinds == {"ValueError: a", "ValueError: b", f"{__name__}.OutOfLuckError: a"}


def test_a_failure_is_short() -> None:
    """It stands in a small record, however long the message."""
    assert len(_kind(ValueError("x" * 100_000))) == 300


@pytest.mark.parametrize("error", [StoreError("no answer"), StateError("mine"), RunBusyError("b")])
def test_errors_that_say_nothing_of_the_training(error: Exception) -> None:
    """Storage that is down, and what no retry mends, is no reason for an older checkpoint."""
    assert exception_failure(error, HERE) is None


def test_a_checkpoint_that_cannot_be_restored_is_a_failure() -> None:
    """Its bytes were right and it does not fit: an older one may."""
    assert _kind(CorruptCheckpointError("lacks x")).startswith("ckpt_tasks.errors.Corrupt")


def test_before_training_there_is_no_failure_of_it() -> None:
    """What went wrong without a position went wrong without a checkpoint."""
    assert exception_failure(ValueError("a"), None) is None
    assert death_failure(-9, None) is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (-signal.SIGKILL, "SIGKILL"),
        (-signal.SIGRTMAX + 1, f"signal {signal.SIGRTMAX - 1}"),
        (3, "exit code 3"),
    ],
)
def test_a_death_is_told_by_its_signal_or_code(code: int, kind: str) -> None:
    """Also a signal without a name."""
    assert death_failure(code, HERE) == Failure(kind=kind, step=12)


def test_a_message_is_always_text() -> None:
    """File names that are no UTF-8 reach messages as lone surrogates, which no record can hold."""
    outcome = TrainOutcome.failure(ValueError("no file caf\udce9"), run="toy", position=HERE)
    assert "no file caf\\udce9" in outcome.message
    assert outcome.message.encode()


def test_a_long_message_is_cut() -> None:
    """It says how much is missing."""
    assert message_of(ValueError("x" * 4010)).endswith("x... [10 more characters]")
