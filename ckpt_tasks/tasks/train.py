"""Step 3: one attempt, supervised; its outcome as a value or as the error that fits it."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_tasks.errors import (
    AttemptFailedError,
    AttemptStoppedError,
    CheckpointNotFoundError,
    CkptTasksError,
    ConfigError,
    RunBusyError,
    StaleAttemptError,
)
from ckpt_tasks.events import EventSink, discard_event
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE

__all__ = ["error_of", "is_worth_retrying", "train"]

_ERRORS: dict[int, type[CkptTasksError]] = {
    error.exit_code: error
    for error in (
        AttemptFailedError,
        ConfigError,
        StaleAttemptError,
        CheckpointNotFoundError,
        RunBusyError,
        AttemptStoppedError,
    )
}


def _never() -> bool:
    return False


def train(
    spec: TrainSpec,
    on_event: EventSink = discard_event,
    *,
    stop_requested: Callable[[], bool] = _never,
) -> TrainOutcome:
    """Run one attempt to its end. It claims its number first, then picks its checkpoint.

    Parameters
    ----------
    spec
        From `resolve`; `resume` is passed on unchanged, as the trainer knows from the store
        whether it still binds.
    on_event
        Called in this thread for every event and every line the trainer prints.
    stop_requested
        Polled; once true, the trainer saves at its next boundary and stops.

    Returns
    -------
    TrainOutcome
        Training is complete, now or before.

    Raises
    ------
    AttemptFailedError, AttemptStoppedError, RunBusyError
        Worth retrying; see `is_worth_retrying`.
    ConfigError, StaleAttemptError, CheckpointNotFoundError
        A retry changes nothing.
    """
    outcome = launch(spec, on_event, stop_requested=stop_requested)
    if outcome.code == EXIT_DONE:
        return outcome
    raise error_of(outcome)


def error_of(outcome: TrainOutcome) -> CkptTasksError:
    """The error that fits an outcome other than 0."""
    return _ERRORS.get(outcome.code, AttemptFailedError)(outcome.message)


def is_worth_retrying(error: BaseException) -> bool:
    """Whether another attempt may end better than the one that raised `error`.

    False for outcomes 2, 3 and 4: wrong configuration or no progress, a later attempt owns the
    run, nothing restorable.
    """
    return not isinstance(error, ConfigError | StaleAttemptError | CheckpointNotFoundError)
