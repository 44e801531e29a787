"""Saves that fail: which are tried again at once, how often, and for how long."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.made_runs import MadeRun

from ckpt_tasks.errors import NoSpaceError, StaleAttemptError, StoreError
from ckpt_tasks.events import (
    CheckpointCommitted,
    Event,
    MetricsLogged,
    SaveFailed,
    SavesRecovered,
    SaveStarted,
    Warned,
)
from ckpt_tasks.schedule.policy import AnyOf, AtEnd, EverySteps, OnSignal
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore, WrapperStore
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.metrics import JOURNAL_ROWS
from ckpt_tasks.training.reporter import Reporter
from ckpt_tasks.training.saver import Saver, TrainingStopped

ALWAYS = [Fault(at=1, times=1_000_000)]


class Scene:
    """A saver whose store fails as told, and whose time is a number.

    Parameters
    ----------
    faults
        Of the store's writes.
    full
        How many writes find no room.
    during_pause
        Called with the saver at the end of each pause between two tries.
    """

    def __init__(
        self,
        faults: Sequence[Fault] = (),
        *,
        max_unprotected: float = 60.0,
        grace: float = 20.0,
        stop_on_error: bool = False,
        makes_room: bool = False,
        full: int = 0,
        during_pause: Callable[[Saver], None] = lambda saver: None,
    ) -> None:
        self.run = MadeRun()
        self.clock = FakeClock()
        self.events: list[Event] = []
        self.counters = Counters(step=5)
        store = FaultyStore(FullStore(self.run.store, full), faults, counted={"write"})

        def sleep(seconds: float) -> None:
            self.clock.sleep(seconds)
            during_pause(self.saver)

        self.reporter = Reporter(self.events.append, self.clock)
        self.saver = Saver(
            "digits",
            checkpointer=self.run.begin(through=store).checkpointer,
            schedule=AnyOf((OnSignal(), AtEnd(), EverySteps(5))),
            capture=lambda: TrackedItems().capture({"model": {"weight": torch.ones(2)}}),
            exact=lambda: True,
            on_event=self.events.append,
            reporter=self.reporter,
            max_unprotected=max_unprotected,
            grace=grace,
            stop_on_error=stop_on_error,
            makes_room=makes_room,
            clock=self.clock,
            sleep=sleep,
        )

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


def test_the_final_save_is_tried_again() -> None:
    """A store that fails just then costs two pauses, each failure told, and not the attempt."""
    scene = Scene([Fault(at=1, times=2)])
    scene.saver.finish(scene.counters, save=True)
    assert scene.saver.checkpoint == "step-00000005-a1-s3"
    assert scene.clock.slept == [0.5, 1.0]
    assert scene.count(SaveStarted) == 3
    assert scene.count(SaveFailed) == 2
    assert scene.count(CheckpointCommitted) == 1


def test_the_final_save_is_tried_until_unprotected_for_too_long() -> None:
    """Pauses grow to five seconds; at the limit comes the last try, and then the failure."""
    scene = Scene(ALWAYS, max_unprotected=60.0)
    with pytest.raises(StoreError, match="no new checkpoint for 60 s"):
        scene.saver.finish(scene.counters, save=True)
    assert sum(scene.clock.slept) == 60.0
    assert scene.clock.slept[:5] == [0.5, 1.0, 2.0, 4.0, 5.0]
    assert max(scene.clock.slept) == 5.0
    assert scene.count(SaveFailed) == len(scene.clock.slept) + 1


def test_the_signal_save_is_tried_again() -> None:
    """Training stops as asked, with its state saved, although the store failed at first."""
    scene = Scene([Fault(at=1, times=2)])
    scene.saver.request_stop("received SIGTERM")
    with pytest.raises(TrainingStopped):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.saver.saved == scene.counters.position


@pytest.mark.parametrize(("grace", "tries"), [(20.0, 8), (0.0, 1)])
def test_the_signal_save_is_tried_within_the_grace(grace: float, tries: int) -> None:
    """Counted from the request to stop; without any grace there is one try."""
    scene = Scene(ALWAYS, grace=grace)
    scene.saver.request_stop("received SIGTERM")
    with pytest.raises(StoreError, match="could not be saved"):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.clock() == grace
    assert scene.count(SaveFailed) == tries


def test_a_request_to_stop_shortens_the_final_save() -> None:
    """One that comes between two tries leaves the grace for more of them, and no longer."""
    scene = Scene(ALWAYS, grace=3.0, during_pause=lambda saver: saver.request_stop("SIGTERM"))
    with pytest.raises(StoreError):
        scene.saver.finish(scene.counters, save=True)
    assert scene.clock() == 0.5 + 3.0


def test_other_saves_do_not_wait() -> None:
    """Training goes on at once; a later boundary tries again."""
    scene = Scene([Fault(at=1)], max_unprotected=60.0)
    scene.saver.at_boundary("step", scene.counters)
    assert scene.clock.slept == []
    assert scene.saver.checkpoint is None
    scene.counters.step += 1
    scene.clock.advance(3.0)
    scene.saver.at_boundary("step", scene.counters)
    assert scene.saver.checkpoint == "step-00000006-a1-s2"


def test_the_first_failure_ends_training_where_that_is_asked_for() -> None:
    """Told, and not tried again; but the save at the end is."""
    scene = Scene([Fault(at=1)], stop_on_error=True)
    with pytest.raises(StoreError, match=r"step-00000005-a1-s1 .* 'stop' ends the attempt"):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.count(SaveFailed) == 1
    scene.counters.step += 5
    with pytest.raises(StoreError, match="'stop' ends the attempt"):
        scene.saver.at_boundary("step", scene.counters)
    assert scene.count(SaveStarted) == 1

    scene = Scene([Fault(at=1, times=2)], stop_on_error=True)
    scene.saver.finish(scene.counters, save=True)
    assert scene.saver.checkpoint == "step-00000005-a1-s3"


class FullStore(WrapperStore):
    """Has no room for its first `times` writes."""

    def __init__(self, store: Store, times: int) -> None:
        super().__init__(store)
        self._left = times

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._left -= 1
        if self._left >= 0:
            raise NoSpaceError("no space left")
        super().write(path, parts, size)


@pytest.mark.parametrize(("makes_room", "ends_after"), [(False, 1), (True, 2)])
def test_a_full_disk_ends_training_only_when_no_room_could_be_made(
    makes_room: bool, ends_after: int
) -> None:
    """With on_error = stop, too, a save is tried once more where something may be removed."""
    scene = Scene(stop_on_error=True, makes_room=makes_room, full=2)
    for _ in range(ends_after - 1):
        scene.saver.at_boundary("step", scene.counters)
        scene.counters.step += 5
        scene.clock.advance(5.0)
    with pytest.raises(StoreError, match=r"save\.on_error"):
        scene.saver.at_boundary("step", scene.counters)
    failed = [event for event in scene.events if isinstance(event, SaveFailed)]
    assert [event.failures for event in failed] == list(range(1, ends_after + 1))
    assert all(event.no_space for event in failed)


def test_the_end_of_an_outage_is_told() -> None:
    """How many saves had failed, and for how long there was no new checkpoint."""
    scene = Scene([Fault(at=1, times=2)], max_unprotected=60.0)
    while scene.saver.checkpoint is None:
        scene.saver.at_boundary("step", scene.counters)
        scene.clock.advance(3.0)
    (recovered,) = [event for event in scene.events if isinstance(event, SavesRecovered)]
    assert (recovered.failures, recovered.unprotected) == (2, 6.0)
    assert [event.again for event in scene.events if isinstance(event, SaveFailed)] == [False, True]


def test_a_stale_attempt_is_not_tried_again() -> None:
    """Another attempt owns the run: there is nothing to wait for."""
    scene = Scene()
    scene.run.put_claim(2)
    with pytest.raises(StaleAttemptError):
        scene.saver.finish(scene.counters, save=True)
    assert scene.clock.slept == []


def test_trying_again_draws_no_random_number() -> None:
    """The training's global generators are where they were."""

    def states() -> str:
        return repr([random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()])

    scene = Scene([Fault(at=1, times=3)])
    before = states()
    scene.saver.finish(scene.counters, save=True)
    assert states() == before


@pytest.mark.parametrize(("values", "told"), [(JOURNAL_ROWS, 0), (JOURNAL_ROWS + 1, 1)])
def test_metrics_that_no_checkpoint_keeps_are_told_once(values: int, told: int) -> None:
    """All are sent; what the next checkpoint leaves out is warned of, in the first place only."""
    scene = Scene()
    for _ in range(2):
        scene.reporter.metrics.log({f"key-{number}": 1.0 for number in range(values)})
        scene.counters.step += 1
        scene.saver.at_boundary("end", scene.counters)
    sent = [len(event.rows) for event in scene.events if isinstance(event, MetricsLogged)]
    assert sent == [values, values]
    assert scene.count(CheckpointCommitted) == 2
    warnings = [event.message for event in scene.events if isinstance(event, Warned)]
    assert len(warnings) == told
    assert all(str(JOURNAL_ROWS) in warning for warning in warnings)
