from __future__ import annotations

import pickle

import pytest

from ckpt_tasks import errors, tasks
from ckpt_tasks.tasks.train import error_of
from ckpt_tasks.training.spec import TrainOutcome
from ckpt_tasks.types import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_STALE,
    EXIT_STOPPED,
    EXIT_USAGE,
)


@pytest.mark.parametrize(
    ("code", "error", "worth_retrying"),
    [
        (EXIT_FAILED, errors.AttemptFailedError, True),
        (EXIT_USAGE, errors.ConfigError, False),
        (EXIT_STALE, errors.StaleAttemptError, False),
        (EXIT_NOT_FOUND, errors.CheckpointNotFoundError, False),
        (EXIT_BUSY, errors.RunBusyError, True),
        (EXIT_STOPPED, errors.AttemptStoppedError, True),
        (-9, errors.AttemptFailedError, True),
    ],
)
def test_each_outcome_has_its_error(
    code: int, error: type[errors.CkptTasksError], worth_retrying: bool
) -> None:
    """An outcome's code decides the error, which keeps the message and says if a retry helps."""
    made = error_of(TrainOutcome(code=code, message="because", run="r"))

    assert type(made) is error
    assert str(made) == "because"
    assert tasks.is_worth_retrying(made) is worth_retrying


def test_no_progress_is_not_worth_retrying() -> None:
    """The cap on attempts without a commit ends the orchestrator's retries too."""
    assert not tasks.is_worth_retrying(errors.NoProgressError("enough"))


def test_failure_of_storage_is_worth_retrying() -> None:
    """Storage that does not answer now may answer later."""
    assert tasks.is_worth_retrying(errors.StoreError("no answer"))


def test_errors_cross_processes() -> None:
    """An orchestrator may pickle the error to its parent; type and message survive."""
    made = pickle.loads(pickle.dumps(errors.AttemptFailedError("killed by SIGKILL")))  # noqa: S301

    assert type(made) is errors.AttemptFailedError
    assert str(made) == "killed by SIGKILL"
