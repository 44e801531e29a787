"""A store that is taken away while a training runs: told once, survived, and never doubled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from support.launches import TOY, Launch, launched, wait_until
from support.powers import drop_roots_powers
from support.run_checks import check_run, leftovers
from support.small_disk import SmallDisk
from support.toy_runs import STEPS, toy_spec

from ckpt_tasks.config import RetentionConfig
from ckpt_tasks.events import (
    CheckpointCommitted,
    Event,
    Progress,
    RetentionApplied,
    SaveFailed,
    SavesRecovered,
    Warned,
)
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.records import MarkRecord
from ckpt_tasks.tasks.narrate import narrate
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED

WIDTH = 2_000
CHECKPOINT = 240_000
"""Bytes of one, of so many hidden units."""


def _spec(root: Path, *, max_unprotected: float, **changes: object) -> TrainSpec:
    spec = toy_spec(root, entrypoint=f"{TOY}:train", **changes)
    attempt = msgspec.structs.replace(spec.config.attempt, max_unprotected=max_unprotected)
    config = msgspec.structs.replace(spec.config, attempt=attempt)
    return msgspec.structs.replace(spec, config=config)


class Limited(Launch):
    """Whose processes permissions hold for, also where the test is root's."""

    def _launch(self, spec: TrainSpec) -> None:
        drop_roots_powers()
        super()._launch(spec)


class Episode:
    """A fault while `attempt` trains: the events since it began."""

    def __init__(self, attempt: Launch) -> None:
        self._attempt = attempt
        self._begin = len(attempt.events)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self._attempt.events[self._begin :] if isinstance(event, kind)]

    def wait_for(self, kind: type[Event], count: int = 1) -> None:
        wait_until(
            lambda: len(self.of(kind)) >= count or not self._attempt.is_running,
            f"{count} {kind.__name__}",
        )
        assert self._attempt.is_running, self._attempt.outcome()

    def told(self) -> list[str]:
        """What people read of failures."""
        lines = [narrate(event) for event in self.of(SaveFailed)]
        return [line[1] for line in lines if line is not None]


@contextmanager
def _episode(attempt: Launch, says: str) -> Iterator[None]:
    """Within it saves fail and steps are done; afterwards saves succeed again."""
    attempt.wait_for(CheckpointCommitted)
    episode = Episode(attempt)
    yield
    episode.wait_for(SaveFailed, 2)
    steps = len(episode.of(Progress))
    wait_until(lambda: len(episode.of(Progress)) > steps, "steps while saves fail")
    assert not episode.of(SavesRecovered)
    (line,) = episode.told()
    assert says in line
    assert "of run 'toy' was not saved" in line


def _recovered(attempt: Launch, times: int) -> None:
    wait_until(lambda: len(attempt.of(SavesRecovered)) == times, "saves that succeed again")
    count = len(attempt.of(CheckpointCommitted))
    wait_until(lambda: len(attempt.of(CheckpointCommitted)) > count, "the next checkpoint")


def _repeated(*command: str | Path) -> None:
    """As soon as nothing is being written: a file system in use is not remounted."""
    wait_until(
        lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0,
        f"{command}",
    )


def test_each_fault_is_told_once_and_ends_with_the_fault(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission withdrawn, remounted read-only, unmounted: one attempt survives all three."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.02")
    place = tmp_path / "place"
    (disk.path / "store").mkdir()
    place.mkdir()
    _repeated("mount", "--bind", disk.path / "store", place)
    spec = _spec(place, max_unprotected=20.0, params={"epochs": 10_000})
    data = place / "toy" / "data"
    attempt = Limited(spec)
    try:
        with _episode(attempt, "Permission denied. Give the user with id "):
            data.chmod(0o500)
        data.chmod(0o700)
        _recovered(attempt, 1)
        with _episode(attempt, "Read-only file system. The file system of "):
            _repeated("mount", "-o", "remount,bind,ro", place)
        _repeated("mount", "-o", "remount,bind,rw", place)
        _recovered(attempt, 2)
        with _episode(attempt, "is gone, the claim of the attempt that goes on here: "):
            _repeated("umount", "--lazy", place)
        strays = [path for path in place.rglob("*") if path.is_file()]
        _repeated("mount", "--bind", disk.path / "store", place)
        _recovered(attempt, 3)
        attempt.request_stop()
        assert attempt.outcome().code == EXIT_STOPPED, attempt.output
    finally:
        attempt.request_stop()
        attempt.outcome()
        # What was being written when the store went could not be removed: `collect` does that.
        check_run(spec)
        _repeated("umount", "--lazy", place)
    assert {path.suffix for path in strays} <= {".heartbeat"}, "nothing that a mount could hide"


def test_room_is_made_by_what_expired_long_enough_ago(disk: SmallDisk) -> None:
    """A disk that holds three checkpoints is collected once a save finds no room: within the grace
    nothing goes; then what has expired does, and the save that is tried once more stands.
    """
    root = disk.path / "store"
    spec = _spec(root, max_unprotected=40.0, params={"epochs": 3, "width": WIDTH})
    config = msgspec.structs.replace(spec.config, retention=RetentionConfig(latest=1, grace=3600.0))
    spec = msgspec.structs.replace(spec, config=config)
    disk.fill(leaving=7 * CHECKPOINT // 2)
    with launched(spec) as attempt:
        failed = attempt.wait_for(SaveFailed)
        assert failed.no_space
        assert f"no space left for {root}/toy/data/" in failed.why
        _wait_for_marks(root)
        before = len(attempt.of(CheckpointCommitted))
        assert not [event for event in attempt.of(RetentionApplied) if event.removed]
        for mark in (root / "toy/marks/expired").iterdir():
            _age(mark, 7200)
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, [str(event) for event in attempt.of(Warned)]
    (recovered,) = attempt.of(SavesRecovered)
    assert recovered.failures == len(attempt.of(SaveFailed))
    removed = [one for event in attempt.of(RetentionApplied) for one in event.removed]
    assert 1 <= len(removed) < before
    assert check_run(spec)[-1].step == STEPS
    assert leftovers(spec) == set()


def _age(mark: Path, seconds: float) -> None:
    """Make it older, and of another machine: this one's uptime knows better."""
    time = mark.stat().st_mtime - seconds
    with mark.open("r+b") as file:  # in its place: the disk is full
        record = decode(file.read(), MarkRecord, path=str(mark))
        file.seek(0)
        file.write(encode(msgspec.structs.replace(record, uptime=None)))
        file.truncate()
    os.utime(mark, (time, time))


def _wait_for_marks(root: Path) -> None:
    """On all checkpoints but the newest: as many as the retry and the final save need."""
    commits, marks = root / "toy/commits", root / "toy/marks/expired"
    wait_until(
        lambda: marks.is_dir() and len(os.listdir(marks)) == len(os.listdir(commits)) - 1 > 1,
        "marks of what has expired",
    )
