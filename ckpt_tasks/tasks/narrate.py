"""One readable line for each event of an attempt, for the shell and for orchestrators' logs."""

from __future__ import annotations

import logging

from ckpt_tasks.escaping import printable
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
    RetentionApplied,
    SaveAwaited,
    SaveDelayed,
    SaveFailed,
    SavesRecovered,
    Warned,
)
from ckpt_tasks.masking import mask_text
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED

__all__ = ["narrate"]


def narrate(event: Event) -> tuple[int, str] | None:
    """Level (of the standard library's `logging`) and text, or ``None`` for what needs no line.

    The trainer's own output comes back as it is; in all else, credentials are masked
    and control characters spelled out.
    """
    if isinstance(event, OutputLine):
        return logging.INFO, event.text
    described = _describe(event)
    return described and (described[0], printable(mask_text(described[1])))


def _describe(event: Event) -> tuple[int, str] | None:
    match event:
        case AttemptClaimed():
            return logging.INFO, (
                f"attempt {event.attempt} of run {event.run!r} has begun (pid {event.pid})"
            )
        case AttemptResumed():
            return logging.INFO, _resumed(event)
        case CheckpointCommitted():
            return logging.INFO, (
                f"saved {event.checkpoint}, {readable_size(event.size)}, waited "
                f"{event.seconds:.2f} s ({event.trigger}: {event.reason})"
            )
        case CheckpointRegistered():
            return logging.INFO, (
                f"registered {event.checkpoint} as {event.registered_model} version {event.version}"
            )
        case RegistryLinked():
            return logging.INFO, (
                f"metrics and checkpoints go to {event.tracking_uri}, run {event.run_id}"
            )
        case RetentionApplied():
            return logging.INFO, _retention(event)
        case _:
            return _trouble(event)


def _retention(event: RetentionApplied) -> str:
    told = []
    if event.expired:
        told.append(f"no longer kept: {', '.join(event.expired)}")
    if event.removed:
        told.append(f"removed: {', '.join(event.removed)} ({readable_size(event.freed)})")
    return "; ".join(told)


def _resumed(event: AttemptResumed) -> str:
    if event.checkpoint is None:
        return f"attempt {event.attempt} starts from the beginning: {event.why}"
    lost = f", lost {event.lost_steps} steps" if event.lost_steps else ""
    return (
        f"attempt {event.attempt} resumed from {event.checkpoint}, {event.position}{lost}: "
        f"{event.why}"
    )


def _trouble(event: Event) -> tuple[int, str] | None:
    match event:
        case CheckpointQuarantined():
            return logging.ERROR, f"{event.checkpoint} is damaged, quarantined: {event.why}"
        case SaveFailed(again=False):
            return logging.WARNING, _failed(event)
        case SavesRecovered():
            return logging.INFO, (
                f"saves succeed again, after {event.failures} that failed and "
                f"{event.unprotected:.0f} s without a durable checkpoint"
            )
        case SaveDelayed():
            return _delayed(event)
        case SaveAwaited():
            return logging.INFO, (
                f"still waiting until {event.checkpoint} is written, for {event.waited:.0f} s so "
                f"far and {event.left:.0f} s more at most"
            )
        case RegistryUnavailable():
            return logging.WARNING, _unavailable(event)
        case MetricsReplayed():
            return _replayed(event)
        case Warned():
            return logging.WARNING, event.message
        case AttemptEnded():
            fine = event.code in (EXIT_DONE, EXIT_STOPPED)
            return (logging.INFO if fine else logging.ERROR), event.message
        case _:
            return None


def _failed(event: SaveFailed) -> str:
    nth = f" ({event.failures} saves have failed)" if event.failures > 1 else ""
    return (
        f"{event.checkpoint} of run {event.run!r} was not saved{nth}, {event.unprotected:.0f} s "
        f"without a durable checkpoint; training goes on: {event.why}"
    )


def _replayed(event: MetricsReplayed) -> tuple[int, str]:
    told = f"attempt {event.attempt} of run {event.run!r} {event.replay}"
    if not event.replay.has_diverged:
        return logging.INFO, told
    return logging.WARNING, (
        f"{told}. The training is not deterministic: its state and the order of its data were "
        "restored exactly, and what it computed from them is not the same"
    )


def _delayed(event: SaveDelayed) -> tuple[int, str]:
    due = f"a save is due at {event.position} ({event.trigger}: {event.reason})"
    if event.waits:
        return logging.WARNING, f"{due}; training waits until {event.behind} is written"
    return logging.INFO, f"{due} and put off until {event.behind} is written"


def _unavailable(event: RegistryUnavailable) -> str:
    if event.again and event.left is not None:
        return f"still waiting for the registry, {event.left:.0f} s left"
    still = "still " if event.again else ""
    return f"the registry has {still}not taken all, {event.queued} requests wait: {event.why}"
