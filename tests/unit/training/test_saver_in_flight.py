"""Saves that are still being written while training goes on."""

from __future__ import annotations

import itertools
from typing import TypeVar

import pytest
import torch
from support.made_runs import MadeRun

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import Drain, InlineDrain, WriterDiedError
from ckpt_tasks.checkpointer.job import SaveJob
from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.errors import StaleAttemptError, StoreError
from ckpt_tasks.events import (
    CheckpointCommitted,
    Event,
    SaveAwaited,
    SaveDelayed,
    SaveFailed,
    SaveStarted,
    Warned,
)
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.schedule.policy import AnyOf, AtEnd, EveryEpochs, EverySteps, OnSignal
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.testing import FakeClock
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.reporter import Reporter
from ckpt_tasks.training.saver import Saver, TrainingStopped
from ckpt_tasks.types import CheckpointId, Number

E = TypeVar("E", bound=Event)
Row = tuple[str, Number, int, int]


class HeldDrain(Drain):
    """Really writes, but only once it is looked at `looks` times after each hand-over; dies
    as often as told.
    """

    is_concurrent = False

    def __init__(self, inline: InlineDrain, clock: FakeClock) -> None:
        self._inline = inline
        self._clock = clock
        self._left = 0
        self._job: tuple[SaveJob, Arena, int] | None = None
        self.looks = 0
        self.deaths = 0
        self.stopped = 0

    def prepare(self, arena: Arena) -> None:
        pass

    def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
        self._job, self._left = (job, arena, size), self.looks

    def poll(self, timeout: float) -> CommitRecord | None:
        self._clock.advance(timeout)
        if self.deaths:
            self.deaths -= 1
            raise WriterDiedError("was killed")
        self._left -= 1
        if self._left >= 0 or self._job is None:
            return None
        self._inline.hand_over(*self._job)
        return self._inline.poll(timeout)

    def stop(self) -> None:
        self.stopped += 1
        self._job = None


class Scene:
    """A saver whose saves end when they are told to, and whose time is a number."""

    def __init__(self, *, max_unprotected: float = 60.0, grace: float = 20.0) -> None:
        self.made = MadeRun()
        attempt = self.made.begin()
        self.clock = FakeClock()
        self.events: list[Event] = []
        self.counters = Counters(step=5)
        self.drain = HeldDrain(
            InlineDrain(self.made.runner(self.made.store, attempt.attempt)), self.clock
        )
        self.value = torch.zeros(2)
        self.reporter = Reporter(self.events.append, self.clock)
        self.saver = Saver(
            "digits",
            checkpointer=Checkpointer(
                self.drain,
                self.made.identity,
                attempt.number,
                attempt.recovered.lineage,
                hyperparameters={},
                environment={},
            ),
            schedule=AnyOf((OnSignal(), AtEnd(), EveryEpochs(1), EverySteps(5))),
            capture=lambda: TrackedItems().capture({"model": {"weight": self.value}}),
            exact=lambda: True,
            on_event=self.events.append,
            reporter=self.reporter,
            max_unprotected=max_unprotected,
            grace=grace,
            clock=self.clock,
            sleep=self.clock.sleep,
        )

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def made_checkpoint(self) -> CheckpointId:
        """The newest one."""
        assert self.saver.checkpoint is not None
        return CheckpointId.parse(self.saver.checkpoint)

    def step(self, count: int = 1) -> None:
        """Steps, each with a boundary behind it."""
        for _ in range(count):
            self.counters.step += 1
            self.saver.at_boundary("step", self.counters)

    @property
    def saved(self) -> list[int]:
        """Steps of the checkpoints, by their commits."""
        return [event.position.step for event in self.of(CheckpointCommitted)]


def test_training_goes_on_while_a_save_is_written() -> None:
    """What has been staged is what is saved, however often the state has changed since."""
    scene = Scene()
    scene.drain.looks = 3
    scene.saver.at_boundary("step", scene.counters)
    scene.value += 1
    scene.step(2)
    assert scene.saved == []
    assert scene.saver.checkpoint is None
    scene.step()
    assert scene.saved == [5]
    assert scene.saver.checkpoint == "step-00000005-a1-s1"
    record = scene.made.record(scene.made_checkpoint)
    index_path = scene.made.tensors_path(record.checkpoint)
    assert scene.made.store.read(index_path)[-8:] == bytes(8)


def test_a_step_save_is_put_off_and_made_up_for() -> None:
    """One that is due while another is written comes at the first boundary behind that."""
    scene = Scene()
    scene.drain.looks = 7
    scene.saver.at_boundary("step", scene.counters)
    scene.step(5)  # step 10 is due
    scene.step(1)
    (delayed,) = scene.of(SaveDelayed)
    assert (delayed.position.step, delayed.waits) == (10, False)
    assert delayed.behind == "step-00000005-a1-s1"
    scene.step(1)
    assert [event.checkpoint for event in scene.of(SaveStarted)] == [
        "step-00000005-a1-s1",
        "step-00000012-a1-s2",
    ]
    scene.saver.settle()
    assert scene.saved == [5, 12]


def test_an_epochs_save_waits_for_the_one_in_flight() -> None:
    """It is of that moment: its metrics belong to no later one."""
    scene = Scene()
    scene.drain.looks = 3
    scene.saver.at_boundary("step", scene.counters)
    scene.counters.step += 1
    scene.saver.at_boundary("epoch", scene.counters)
    (delayed,) = scene.of(SaveDelayed)
    assert delayed.waits
    assert scene.saved == [5]
    scene.saver.settle()
    assert scene.saved == [5, 6]


@pytest.mark.parametrize("save", [True, False])
def test_the_end_waits_for_what_is_in_flight(save: bool) -> None:
    """Training is over only when its saves are."""
    scene = Scene()
    scene.drain.looks = 3
    scene.saver.at_boundary("step", scene.counters)
    scene.counters.step += 1
    scene.saver.finish(scene.counters, save=save)
    assert scene.saved == [5, 6][: 2 if save else 1]


def test_the_end_makes_up_for_a_save_that_failed() -> None:
    """No boundary comes behind it: the run would be complete without what was to be saved."""
    scene = Scene()
    scene.drain.looks, scene.drain.deaths = 1, 3
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.finish(scene.counters, save=False)
    assert (len(scene.of(SaveFailed)), scene.saved) == (1, [5])
    scene.drain.deaths = 1000
    scene.counters.step = 10
    scene.saver.at_boundary("step", scene.counters)
    with pytest.raises(StoreError, match="could not be saved"):
        scene.saver.finish(scene.counters, save=False)


def test_who_waits_for_minutes_is_told_at_growing_intervals() -> None:
    """Since when training has stood still, and when that save would be given up."""
    scene = Scene(max_unprotected=600.0)
    scene.drain.looks = 4 * 180  # each of which takes a quarter of a second
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.finish(scene.counters, save=False)
    awaited = scene.of(SaveAwaited)
    assert [round(event.waited, -1) for event in awaited] == [10, 20, 40, 80, 140]
    assert {round(event.waited + event.left) for event in awaited} == {600}
    assert {event.checkpoint for event in awaited} == {scene.saver.checkpoint}


def test_a_signal_saves_behind_the_one_in_flight() -> None:
    """Both are committed before training stops."""
    scene = Scene()
    scene.drain.looks = 3
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.request_stop("received SIGTERM")
    scene.counters.step += 1
    with pytest.raises(TrainingStopped):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.saved == [5, 6]


def test_a_grace_that_is_too_short_is_told() -> None:
    """Before the save that may come too late, with what it would take."""
    scene = Scene(grace=0.0)
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.request_stop("received SIGTERM")
    scene.counters.step += 1
    with pytest.raises(TrainingStopped):
        scene.saver.at_boundary("step", scene.counters)
    warnings = [event.message for event in scene.of(Warned)]
    assert any("0 s are left to save and stop" in warning for warning in warnings)


def test_a_save_in_flight_at_the_end_of_the_grace_goes_on_alone() -> None:
    """Training stops as asked; nobody ends the writer."""
    scene = Scene(grace=3.0)
    scene.drain.looks = 1_000_000
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.request_stop("received SIGTERM")
    with pytest.raises(StoreError, match="may yet become a checkpoint"):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.drain.stopped == 0
    assert 3.0 <= scene.clock() < 4.0


def test_a_save_that_does_not_end_has_failed() -> None:
    """After the time for which training may be unprotected, and then so has the attempt."""
    scene = Scene(max_unprotected=60.0)
    scene.drain.looks = 1_000_000
    scene.saver.at_boundary("step", scene.counters)
    scene.clock.advance(59.0)
    scene.step()
    assert scene.of(SaveFailed) == []
    scene.clock.advance(1.0)
    with pytest.raises(StoreError, match="not written within 60 s"):
        scene.step()
    assert scene.drain.stopped == 1
    assert len(scene.of(SaveFailed)) == 1


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_save_is_repeated_when_its_writer_dies(deaths: int) -> None:
    """From the same image, as another checkpoint of the same position."""
    scene = Scene()
    scene.drain.looks, scene.drain.deaths = 1, deaths
    scene.saver.at_boundary("step", scene.counters)
    scene.value += 1  # what a second look at the live state would find
    scene.saver.settle()
    assert scene.saver.checkpoint == f"step-00000005-a1-s{deaths + 1}"
    assert scene.of(SaveFailed) == []
    path = scene.made.tensors_path(scene.made_checkpoint)
    assert scene.made.store.read(path)[-8:] == bytes(8)


def test_a_save_whose_writers_all_die_has_failed() -> None:
    """Training goes on, and a later boundary saves again."""
    scene = Scene(max_unprotected=60.0)
    scene.drain.looks, scene.drain.deaths = 1, 3
    scene.saver.at_boundary("step", scene.counters)
    scene.saver.settle()
    (failed,) = scene.of(SaveFailed)
    assert "was killed, like the 2 before it" in failed.why
    scene.clock.advance(3.0)
    scene.step()
    scene.saver.settle()
    assert scene.saved == [6]


def test_a_failure_is_seen_at_the_next_boundary() -> None:
    """Stale while its save was written: the attempt ends there."""
    scene = Scene()
    scene.drain.looks = 1
    scene.saver.at_boundary("step", scene.counters)
    scene.made.put_claim(2)
    with pytest.raises(StaleAttemptError):
        scene.step(2)
    assert scene.saver.checkpoint is None


def test_metrics_logged_meanwhile_belong_to_the_next_checkpoint() -> None:
    """Each row stands in one checkpoint's index, also after a save that failed."""
    scene = Scene()
    scene.drain.looks = 2
    for step in itertools.count(6):
        scene.reporter.metrics.log({"loss": float(step)})
        scene.step()
        if step == 15:
            break
    scene.saver.finish(scene.counters, save=True)
    rows = [row for read in _journals(scene) for row in read]
    assert [step for _, _, step, _ in rows] == list(range(6, 16))


def _journals(scene: Scene) -> list[list[Row]]:
    made = scene.made
    records = [made.record(CheckpointId.parse(e.checkpoint)) for e in scene.of(CheckpointCommitted)]
    return [read_index(made.store, made.layout, r.indexes[0]).metrics for r in records]
