"""One readable line for each event of an attempt, for an orchestrator's log."""

from __future__ import annotations

import logging

from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptEnded,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointQuarantined,
    CheckpointRegistered,
    Event,
    MetricsReplayed,
    OutputLine,
    RegistryLinked,
    RegistryUnavailable,
    SaveFailed,
    Warned,
)
from ckpt_tasks.tasks.report import human_size
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED

__all__ = ["narrate"]


def narrate(event: Event) -> tuple[int, str] | None:
    """Level (of the standard library's `logging`) and text, or ``None`` for what needs no line.

    The trainer's own output comes back as it is.
    """
    match event:
        case OutputLine():
            return logging.INFO, event.text
        case AttemptClaimed():
            return logging.INFO, f"attempt {event.attempt} of run {event.run!r} has begun"
        case AttemptResumed():
            return logging.INFO, _resumed(event)
        case CheckpointCommitted():
            return logging.INFO, (
                f"{event.checkpoint} committed, {human_size(event.size)} in "
                f"{event.seconds:.2f} s: {event.reason}"
            )
        case CheckpointRegistered():
            name, version = event.registered_model, event.version
            return logging.INFO, f"{event.checkpoint} registered: {name} version {version}"
        case RegistryLinked():
            return logging.INFO, f"metrics and checkpoints go to registry run {event.run_id}"
        case _:
            return _trouble(event)


def _resumed(event: AttemptResumed) -> str:
    if event.checkpoint is None:
        return f"attempt {event.attempt} starts from the beginning: {event.why}"
    return (
        f"attempt {event.attempt} resumed from {event.checkpoint}, {event.position}, lost "
        f"{event.lost_steps} steps: {event.why}"
    )


def _trouble(event: Event) -> tuple[int, str] | None:
    match event:
        case CheckpointQuarantined():
            return logging.ERROR, f"{event.checkpoint} is damaged, quarantined: {event.why}"
        case SaveFailed():
            return logging.WARNING, (
                f"{event.checkpoint} was not saved: {event.why}; training goes on, "
                f"{event.unprotected:.0f} s without a durable checkpoint"
            )
        case RegistryUnavailable():
            return logging.WARNING, (
                f"the registry does not answer ({event.why}); {event.queued} requests wait"
            )
        case MetricsReplayed(diverged=diverged) if diverged:
            return logging.WARNING, (
                f"{diverged} of {event.compared} replayed metric values differ from the first "
                f"time: {', '.join(event.keys[:5])}; the training is not deterministic"
            )
        case Warned():
            return logging.WARNING, event.message
        case AttemptEnded():
            fine = event.code in (EXIT_DONE, EXIT_STOPPED)
            return (logging.INFO if fine else logging.ERROR), event.message
        case _:
            return None
