"""Save decisions: is a save due at this boundary, and why?

A policy is its configuration: a frozen record with one method, as in Orbax's
``SaveDecisionPolicy``. Policies are asked at boundaries only.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.types import Position, SaveDecision

__all__ = [
    "AnyOf",
    "AtEnd",
    "Boundary",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "OnSignal",
    "SaveContext",
    "SaveDecisionPolicy",
    "policy_from_config",
]

Boundary = Literal["step", "epoch", "end"]


class SaveContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy may look at.

    Parameters
    ----------
    boundary
        ``step``: between two steps. ``epoch``: behind an epoch's last code. ``end``: the last
        such boundary of the training.
    saved_step
        The step of the latest checkpoint, or of the start.
    seconds_since_save
        Since the latest checkpoint or the start of the attempt, by a monotonic clock.
    signalled
        A signal asks this process to stop.
    """

    boundary: Boundary
    position: Position
    saved_step: int
    seconds_since_save: float
    signalled: bool = False


class SaveDecisionPolicy(Protocol):
    """Decides at a boundary whether to save."""

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        """Why a save is due now, or ``None``."""


class EverySteps(msgspec.Struct, frozen=True):
    """At every multiple of `steps`, so that a resumed run saves where an uninterrupted one does."""

    steps: int

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        # By quotient, not remainder: after a `break` a multiple may have gone by.
        if context.position.step // self.steps == context.saved_step // self.steps:
            return None
        return SaveDecision("steps", f"every {self.steps} steps")


class EveryEpochs(msgspec.Struct, frozen=True):
    """Behind every `epochs`-th epoch."""

    epochs: int

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        if context.boundary == "step" or (context.position.epoch + 1) % self.epochs:
            return None
        return SaveDecision("epoch", f"every {self.epochs} epochs")


class EverySeconds(msgspec.Struct, frozen=True):
    """At the first boundary `seconds` after the latest checkpoint."""

    seconds: float

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        if context.seconds_since_save < self.seconds:
            return None
        return SaveDecision("duration", f"every {self.seconds:g} s")


class OnSignal(msgspec.Struct, frozen=True):
    """At the first boundary after a signal to stop."""

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        return SaveDecision("signal", "asked to stop") if context.signalled else None


class AtEnd(msgspec.Struct, frozen=True):
    """When training ends."""

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        return SaveDecision("final", "training ended") if context.boundary == "end" else None


class AnyOf(msgspec.Struct, frozen=True):
    """The first of `policies` that wants a save."""

    policies: tuple[SaveDecisionPolicy, ...]

    def should_save(self, context: SaveContext) -> SaveDecision | None:
        for policy in self.policies:
            decision = policy.should_save(context)
            if decision is not None:
                return decision
        return None


def policy_from_config(config: ScheduleConfig) -> AnyOf:
    """The policy that a configuration describes; a signal always saves."""
    policies: list[SaveDecisionPolicy] = [OnSignal()]
    if config.final:
        policies.append(AtEnd())
    if config.every_epochs is not None:
        policies.append(EveryEpochs(config.every_epochs))
    if config.every_steps is not None:
        policies.append(EverySteps(config.every_steps))
    if config.every is not None:
        policies.append(EverySeconds(config.every))
    return AnyOf(tuple(policies))
