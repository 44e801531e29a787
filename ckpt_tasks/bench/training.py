"""A small training, and what a save that drains meanwhile does to it."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod

import msgspec
import torch
from torch import nn

__all__ = ["AsyncSave", "Disturbance", "NotMeasuredError", "Training", "save_while_training"]

_WIDTH, _LAYERS = 512, 3
_STEP_SECONDS = 0.012  # the batch is doubled until a step takes as long
_CALIBRATION_STEPS = 5
_USUAL_SECONDS, _USUAL_STEPS = 0.5, 10  # of undisturbed training before each save, at least


class NotMeasuredError(Exception):
    """A contestant could not be measured; the message says why."""


class AsyncSave(ABC):
    """A way of saving that lets training go on before the checkpoint is durable.

    Attributes
    ----------
    name
        For the table.
    """

    name: str

    def beside(self, training: Training) -> None:  # noqa: B027 - most need not know it
        """Called once, with the training beside which it saves."""

    def prepare(self, number: int) -> None:  # noqa: B027 - most need nothing
        """Called before each save, not measured."""

    @abstractmethod
    def begin(self, number: int) -> None:
        """Save; when this returns, training may go on."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether what was begun is durable; raises what it failed with."""

    def helper_cpu_seconds(self) -> float:
        """Processor time that processes of its own have taken so far."""
        return 0.0

    @abstractmethod
    def stop(self) -> None:
        """End whatever it has started, also in the middle of a save."""


class Disturbance(msgspec.Struct, frozen=True, kw_only=True):
    """What one save did to the training, in seconds.

    Parameters
    ----------
    stall
        For how long the call held it up.
    drain
        From the call until the checkpoint was durable, as seen between two steps.
    slow_down
        What its steps took longer, in all, while it drained: their sum, without their number
        times that of undisturbed ones: the medians just before and just after, in the mean.
    cpu_seconds
        Processor time of trainer and helpers meanwhile, without that of as many undisturbed steps.
    """

    stall: float
    drain: float
    slow_down: float
    cpu_seconds: float


class Training:
    """Forward, backward and optimizer step of a network, on torch's usual threads."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU()) for _ in range(_LAYERS)]
            self._model = nn.Sequential(*layers)
            self._batch = torch.randn(32, _WIDTH)
        self.optimizer = torch.optim.AdamW(self._model.parameters())
        self.step()
        while min(self.step() for _ in range(_CALIBRATION_STEPS)) < _STEP_SECONDS:
            self._batch = torch.cat([self._batch, self._batch])

    def step(self) -> float:
        """Make one; returns the seconds that it took."""
        began = time.perf_counter()
        loss = (self._model(self._batch) - self._batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def usual(self) -> tuple[float, float]:
        """Seconds of a step that nothing disturbs, the median, and its processor seconds."""
        steps, cpu_began = list[float](), time.process_time()
        while len(steps) < _USUAL_STEPS or sum(steps) < _USUAL_SECONDS:
            steps.append(self.step())
        return statistics.median(steps), (time.process_time() - cpu_began) / len(steps)


def save_while_training(
    training: Training, save: AsyncSave, number: int, *, limit: float
) -> Disturbance:
    """Train, save, and train on until the save is durable.

    Parameters
    ----------
    limit
        Seconds that it may take.

    Raises
    ------
    NotMeasuredError
        It took longer.
    """
    save.prepare(number)
    before = training.usual()
    cpu_began = time.process_time() + save.helper_cpu_seconds()
    began = time.perf_counter()
    save.begin(number)
    stall = time.perf_counter() - began
    steps: list[float] = []
    while not save.is_done():
        if time.perf_counter() - began > limit:
            raise NotMeasuredError(f"not durable after {limit:.0f} s")
        steps.append(training.step())
    drain = time.perf_counter() - began
    cpu = time.process_time() + save.helper_cpu_seconds() - cpu_began
    # What else the machine does changes by the second: so the steps after it count as well.
    usual, usual_cpu = map(statistics.mean, zip(before, training.usual(), strict=True))
    return Disturbance(
        stall=stall,
        drain=drain,
        slow_down=sum(steps) - len(steps) * usual,
        cpu_seconds=cpu - len(steps) * usual_cpu,
    )
