"""Killed, or failing, at every operation of the store: the run ends as if nothing had happened."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from support.attempt_forks import AttemptForks, Fork, Kill, StoreFault
from support.run_checks import check_run, leftovers, temporary_files
from support.toy_runs import Digest, toy_spec

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.events import CheckpointCommitted, SaveFailed
from ckpt_tasks.testing.wrappers import CHANGES, OPERATIONS
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED

EPOCHS, STEPS = 2, 16


class Place:
    """Stores for one run after the other, and the digest that all of them must end with."""

    def __init__(self, forks: AttemptForks, root: Path) -> None:
        self.forks = forks
        self.digest = Digest(root / "digest")
        self._root = root
        root.mkdir(parents=True)
        self.expected = self._expect()

    def specs(self) -> Iterator[tuple[int, TrainSpec]]:
        """1 and a new run in a new store, 2 and the next, ..."""
        for number in itertools.count(1):
            yield number, self._spec(f"store-{number:03d}")

    def run(
        self,
        spec: TrainSpec,
        *faults: StoreFault,
        counted: frozenset[str] = CHANGES,
        kill: Kill | None = None,
    ) -> Fork:
        """One attempt."""
        environment = self.digest.environment
        return self.forks.run(
            spec, faults=faults, counted=sorted(counted), environment=environment, kill=kill
        )

    def finish(self, spec: TrainSpec) -> None:
        """Retry without faults; everything must be as it always was."""
        fork = self.run(spec)
        assert fork.outcome.code == EXIT_DONE, fork.output
        check_run(spec, steps=STEPS)
        assert self.digest.read() == self.expected
        self.digest.path.unlink()

    def _spec(self, folder: str) -> TrainSpec:
        """Three checkpoints: within the first epoch, within the second, at the end."""
        spec = toy_spec(self._root / folder, params={"epochs": EPOCHS})
        config = msgspec.structs.replace(spec.config, schedule=ScheduleConfig(every_steps=6))
        return msgspec.structs.replace(spec, config=config)

    def _expect(self) -> str:
        fork = self.run(self._spec("untouched"))
        assert fork.outcome.code == EXIT_DONE, fork.output
        digest = self.digest.read()
        self.digest.path.unlink()
        return digest


@pytest.fixture
def place(forks: AttemptForks, root: Path) -> Place:
    """A place for the runs of one test."""
    return Place(forks, root)


@pytest.mark.parametrize(
    ("when", "resumed"),
    # Before one change is what after the previous one is.
    [("during", False), ("after", False), ("after", True)],
    ids=["during", "after", "after-in-a-resumed-attempt"],
)
def test_killed_at_every_change_of_the_store(
    when: Literal["during", "after"], resumed: bool, place: Place
) -> None:
    """Whichever change of the store the process dies at, a retry ends bit-identical."""
    struck = 0
    for number, spec in place.specs():
        if resumed:
            assert place.run(spec, kill=Kill(step=9)).killed
        fork = place.run(spec, StoreFault(at=number, when=when, how="kill"))
        if not fork.killed:
            assert len(fork.operations) < number
            break
        struck += 1
        place.finish(spec)
    assert struck >= (10 if resumed else 18)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_of_every_operation(when: Literal["before", "after"], place: Place) -> None:
    """Whichever operation fails once, the attempt goes on or ends retryably; nothing is lost."""
    counted = OPERATIONS if when == "before" else CHANGES
    failed_saves = 0
    for number, spec in place.specs():
        fork = place.run(spec, StoreFault(at=number, when=when), counted=counted)
        if len(fork.operations) < number:
            break
        assert fork.outcome.code in (EXIT_DONE, EXIT_FAILED), fork.output
        failures = fork.events_of(SaveFailed)
        failed_saves += len(failures)
        operation, path = fork.operations[number - 1]
        if operation == "write":
            assert failures, f"{path} could not be written and nobody was told"
            assert leftovers(spec) == set()
        place.finish(spec)
    assert failed_saves


def test_a_write_that_fails_midway_leaves_nothing(place: Place) -> None:
    """Half of a file is removed, the failure reported, and the next save is a whole one."""
    struck = 0
    for number, spec in place.specs():
        fork = place.run(spec, StoreFault(at=number, when="during"))
        if len(fork.operations) < number:
            break
        if fork.operations[number - 1][0] == "write":
            struck += 1
            assert fork.events_of(SaveFailed)
            assert leftovers(spec) == set()
            assert temporary_files(Path(spec.config.store.url)) == []
        place.finish(spec)
    assert struck >= 6


def test_a_change_that_lands_late(place: Place) -> None:
    """A change that was reported as failed and takes effect afterwards forks nothing."""
    for number, spec in place.specs():
        fork = place.run(spec, StoreFault(at=number, when="late"))
        if len(fork.operations) < number:
            break
        assert fork.outcome.code in (EXIT_DONE, EXIT_FAILED), fork.output
        place.finish(spec)


def test_a_store_that_fails_for_a_while_costs_no_training(place: Place) -> None:
    """A save that fails is reported, and the next good one, at the latest the last, holds all."""
    _, spec = next(place.specs())
    first_save = StoreFault(at=1, when="before", times=1)
    fork = place.run(spec, first_save, counted=frozenset({"write"}))
    assert fork.outcome.code == EXIT_DONE, fork.output
    assert len(fork.events_of(SaveFailed)) == 1
    assert fork.events_of(CheckpointCommitted)
    place.finish(spec)
