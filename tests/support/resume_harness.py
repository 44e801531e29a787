"""Runs a training function uninterrupted, and in many pieces, and shows whether they differ.

A training function under test gets, besides its `TrainingRun`, a `Recorder`: calling it marks a
place in the user's code. Each place draws from all three global generators and writes the
numbers down, so one draw too many or too few anywhere changes everything that follows. An
attempt is ended by an exception that nothing catches, raised at a place or while a checkpoint is
saved; the next one is executed with new objects and scrambled generators, as in a new process.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import (
    CheckpointCommitted,
    Event,
    MetricsLogged,
    SaveStarted,
    Warned,
)
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

EVERYWHERE = ScheduleConfig(every_steps=1, every_epochs=1)
NOWHERE = ScheduleConfig(final=False)

Training = Callable[[TrainingRun, "Recorder"], None]
Place = tuple[Any, ...]


class SimulatedKill(BaseException):
    """Ends an attempt as SIGKILL does: nothing handles it."""


class Recorder:
    """What a training function does, place by place.

    Parameters
    ----------
    killer
        Called at every place, before it is written down; may raise `SimulatedKill`.
    """

    def __init__(self, killer: Callable[[], None]) -> None:
        self.places: list[Place] = []
        self.digest: str | None = None
        self._killer = killer
        self.resumed_midway = False

    def __call__(self, label: str, *values: Any) -> None:
        """Mark a place: draw from all global generators, keep the numbers and `values`.

        Code that runs in every attempt begins its label with ``setup``; code between the head of
        the epoch loop and the inner loop with ``head``. Neither is compared where it runs again.
        """
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))  # noqa: S311
        self._killer()
        if label.startswith("setup") or (label.startswith("head") and self.resumed_midway):
            return
        if not label.startswith("head"):
            self.resumed_midway = False
        self.places.append((label, *drawn, *(digest_of(value) for value in values)))

    def end(self, *tracked: Any) -> None:
        """The training is over; `tracked` and the generators make up its final state."""
        states = [
            thing.state_dict() if hasattr(thing, "state_dict") else thing for thing in tracked
        ]
        generators = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
        self.digest = digest_of([states, generators])


@dataclass
class Recording:
    """What one attempt did.

    Parameters
    ----------
    cuts
        For each checkpoint: the places and metric rows before it.
    """

    places: list[Place] = field(default_factory=list)
    rows: list[tuple[str, Any, int]] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)
    digest: str | None = None
    outcome: TrainOutcome | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        return self.outcome is None

    def before_checkpoint(self) -> Recording:
        """The part of it that a successor goes on from."""
        places, rows = self.cuts[-1] if self.cuts else (0, 0)
        return Recording(self.places[:places], self.rows[:rows])


class Harness:
    """Executes attempts of one training function in one store in memory.

    Parameters
    ----------
    training
        The function under test.
    schedule
        When its attempts save.
    """

    def __init__(self, training: Training, schedule: ScheduleConfig = EVERYWHERE) -> None:
        self._training = training
        self.spec = TrainSpec(
            entrypoint="test:train",
            run="run",
            invocation="one",
            config=CheckpointConfig(
                store=StoreConfig(url=f"memory://resume-{uuid.uuid4().hex}"), schedule=schedule
            ),
        )

    def attempt(self, kill: Kill | None = None) -> Recording:
        """Execute one attempt; `kill` says where it ends, if not by itself."""
        kill = kill or Kill()
        recording = Recording()
        recorder = Recorder(kill.at_place)
        recording.places = recorder.places

        def on_event(event: Event) -> None:
            if isinstance(event, MetricsLogged):
                recording.rows += [row[:3] for row in event.rows]
            elif isinstance(event, CheckpointCommitted):
                recording.cuts.append((len(recorder.places), len(recording.rows)))
            elif isinstance(event, Warned):
                recording.warnings.append(event.message)
            kill.at_event(event)

        def train(run: TrainingRun) -> None:
            recorder.resumed_midway = (
                run.resumed_from is not None and run.position.phase == "in_epoch"
            )
            self._training(run, recorder)

        _scramble()
        runner = AttemptRunner(self.spec, on_event)
        with contextlib.suppress(SimulatedKill):
            recording.outcome = runner.execute(train)
        recording.digest = recorder.digest
        if multiprocessing.active_children():
            gc.collect()  # a process that dies takes its loader's workers along
        return recording

    def in_pieces(self, kill: Callable[[], Kill], limit: int = 60) -> tuple[Recording, int]:
        """Execute attempts until one ends by itself.

        Returns
        -------
        Recording
            What the attempts did, each up to the checkpoint that its successor started from.
        int
            How many attempts it took.
        """
        whole = Recording()
        for number in range(1, limit):
            piece = self.attempt(kill())
            kept = piece.before_checkpoint() if piece.killed else piece
            whole.places += kept.places
            whole.rows += kept.rows
            whole.warnings += piece.warnings
            # Killed behind its end, a training is complete and not called again.
            whole.digest = piece.digest or whole.digest
            if not piece.killed:
                whole.outcome = piece.outcome
                return whole, number
        raise AssertionError(f"not done after {limit} attempts")


class Kill:
    """Where an attempt ends.

    Parameters
    ----------
    place
        At the n-th place in its code, from 1, counted from its first checkpoint on.
    saving
        While it saves its n-th checkpoint, from 1, which is lost.
    committed
        When its n-th checkpoint, from 1, is committed, before training goes on.
    """

    def __init__(
        self, *, place: int | None = None, saving: int | None = None, committed: int | None = None
    ) -> None:
        self._place, self._saving, self._committed = place, saving, committed
        self._has_saved = False

    def at_place(self) -> None:
        if self._place is not None and self._has_saved:
            self._place -= 1
            if self._place == 0:
                raise SimulatedKill

    def at_event(self, event: Event) -> None:
        if isinstance(event, SaveStarted) and self._saving is not None:
            self._saving -= 1
            if self._saving == 0:
                raise SimulatedKill
        if isinstance(event, CheckpointCommitted):
            self._has_saved = True
            if self._committed is not None:
                self._committed -= 1
                if self._committed == 0:
                    raise SimulatedKill


def digest_of(value: Any) -> str:
    """A short digest of the exact bits of nested tensors, arrays and plain values."""
    digest = hashlib.blake2b(digest_size=8)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield repr((value.dtype, tuple(value.shape))).encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield repr(len(value)).encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def _scramble() -> None:
    """Generators as a new process has them: anywhere."""
    entropy = uuid.uuid4().int & 0xFFFFFFFF
    random.seed(entropy)
    np.random.seed(entropy)
    torch.manual_seed(entropy)
