"""What an exception becomes for the one who decides about a retry."""

from __future__ import annotations

import pytest

from ckpt_tasks.errors import CkptTasksError, ConfigError, StaleAttemptError, StoreError
from ckpt_tasks.training.spec import TrainOutcome
from ckpt_tasks.types import EXIT_FAILED, Position


@pytest.mark.parametrize("kind", [ConfigError, StaleAttemptError, StoreError])
def test_an_error_of_the_package_keeps_its_code_and_words(kind: type[CkptTasksError]) -> None:
    """Its message is said as it is, its class decides the exit code."""
    outcome = TrainOutcome.failure(kind("what is wrong"), run="toy")
    assert (outcome.code, outcome.message) == (kind.exit_code, "what is wrong")


def test_any_other_exception_says_what_was_raised_where() -> None:
    """The user's exception is named with how far training was and what a retry starts from."""
    outcome = TrainOutcome.failure(
        ValueError("too\n  large"), run="toy", position=Position(1, 12), checkpoint="some-id"
    )
    assert outcome.code == EXIT_FAILED
    assert outcome.message == (
        "the training raised ValueError: too large (at step 12 (in epoch 1); newest checkpoint: "
        "some-id)"
    )


def test_userinfo_in_a_message_is_masked() -> None:
    """Outcomes travel to logs and orchestrators: a URL in one shows no password."""
    outcome = TrainOutcome.failure(ConfigError("no file://user:hunter2@host/x"), run="toy")
    assert outcome.message == "no file://***@host/x"
