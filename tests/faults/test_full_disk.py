"""A disk without room: no half-written file stays, no checkpoint is lost, a retry goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support import toy_ranks
from support.attempt_forks import AttemptForks
from support.launches import Launch, is_running, launched, writer_of
from support.run_checks import check_run, leftovers, temporary_files
from support.shell import ckpt_tasks, contents
from support.small_disk import SmallDisk
from support.toy_runs import Digest, toy_spec

from ckpt_tasks.events import (
    AttemptResumed,
    CheckpointCommitted,
    SaveDelayed,
    SaveFailed,
    SaveStarted,
)
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED

EPOCHS, STEPS = 3, 24
WIDTH = 2_000
"""Hidden units: a checkpoint takes about 200 KB."""
CHECKPOINT = 200_000
PATIENCE = 3.0
"""Seconds for which saves may fail, the last one included."""


@pytest.fixture
def large_spec(disk: SmallDisk) -> TrainSpec:
    """The toy training with more weights, on a disk that a test can fill."""
    spec = toy_spec(disk.path / "store", params={"epochs": EPOCHS, "width": WIDTH})
    attempt = msgspec.structs.replace(spec.config.attempt, max_unprotected=PATIENCE)
    return msgspec.structs.replace(
        spec, config=msgspec.structs.replace(spec.config, attempt=attempt)
    )


@pytest.fixture(scope="module")
def expected(forks: AttemptForks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The digest of that training where there is room."""
    folder = tmp_path_factory.mktemp("room")
    digest = Digest(folder / "digest")
    spec = toy_spec(folder / "store", params={"epochs": EPOCHS, "width": WIDTH})
    assert forks.run(spec, environment=digest.environment).outcome.code == EXIT_DONE
    return digest.read()


def _assert_clean(spec: TrainSpec) -> None:
    """Nothing of a failed save is left, under any name."""
    assert leftovers(spec) == set()
    assert temporary_files(Path(spec.config.store.url)) == []


def test_training_goes_on_until_the_last_save_fails(
    disk: SmallDisk, large_spec: TrainSpec, tmp_path: Path
) -> None:
    """Where no checkpoint fits, the first failed save is told, and the last one exits with 1."""
    store = large_spec.config.store.url
    disk.fill(leaving=CHECKPOINT // 2)
    answer = ckpt_tasks(
        *("train", "support.toy_training:train", "--run", "toy", "--store", store),
        *("-p", f"epochs={EPOCHS}", "-p", f"width={WIDTH}", "--every-epochs", "1"),
        folder=tmp_path,
        environment={"CKPT_TASKS_ATTEMPT_MAX_UNPROTECTED": f"{PATIENCE}"},
    )
    assert answer.code == EXIT_FAILED
    assert f"step-{STEPS:08d}-a1-s" in answer.error
    assert "of run 'toy' could not be saved" in answer.error
    assert "no space left for" in answer.error
    told = [line for line in answer.warnings if "no space left for" in line]
    failed = [word for line in told for word in line.split()[:4] if word.startswith("step-")]
    assert failed[0] == "step-00000008-a1-s1"
    assert len(failed) <= 3, "one word when it begins, few while it lasts"
    assert not any("/data/" in f"/{name}" for name in contents(Path(store)))
    _assert_clean(large_spec)


def test_a_run_whose_disk_filled_goes_on_once_there_is_room(
    disk: SmallDisk,
    large_spec: TrainSpec,
    forks: AttemptForks,
    tmp_path: Path,
    expected: str,
) -> None:
    """Checkpoints made before stay restorable; the retry starts from the newest of them."""
    disk.fill(leaving=3 * CHECKPOINT)
    full = forks.run(large_spec)
    assert full.outcome.code == EXIT_FAILED
    assert "no space left for" in full.outcome.message
    assert full.events_of(SaveFailed)
    committed = check_run(large_spec)
    assert 1 <= len(committed) <= 3
    assert full.outcome.checkpoint == str(committed[-1])
    _assert_clean(large_spec)

    disk.make_room()
    digest = Digest(tmp_path / "digest")
    retried = forks.run(large_spec, environment=digest.environment)
    assert retried.outcome.code == EXIT_DONE
    (resumed,) = retried.events_of(AttemptResumed)
    assert resumed.checkpoint == str(committed[-1])
    check_run(large_spec, steps=STEPS)
    assert digest.read() == expected


def test_a_disk_without_room_for_one_rank_of_two(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's part fits, rank 1's does not: no checkpoint, no bytes of it, and training goes on.

    It ends once there is room: the last save is repeated by both until then.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_ranks.__file__).parents[1]))
    spec = toy_spec(disk.path / "store", entrypoint="support.toy_ranks:uneven", params={}, nproc=2)
    disk.fill(leaving=7 * CHECKPOINT // 2)  # one checkpoint takes a good 2
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        _fail_late(attempt)
        failed = attempt.wait_for(SaveFailed)
        before = check_run(spec)
        assert [str(checkpoint) for checkpoint in before] == ["step-00000005-a1-s1"]
        disk.make_room()
        assert attempt.outcome().code == EXIT_DONE
    failures = attempt.of(SaveFailed)
    assert len({event.checkpoint for event in failures}) == len(failures)
    for event in failures:
        assert event.why.count("no space left for") == 1
        assert "the part of rank 1 is missing (rank 1: " in event.why
    after = check_run(spec)
    assert after[0] == before[0]
    assert failed.checkpoint not in map(str, after)
    assert after[-1].step == 24
    _assert_clean(spec)


def _fail_late(attempt: Launch) -> None:
    """Rank 1's part of the second save fails only when training is some steps farther."""
    trainers = [child for child in attempt.supervisor.children() if is_running(child, "trainer")]
    (trainer,) = [trainer for trainer in trainers if trainer.environ()["RANK"] == "1"]
    writer = writer_of(trainer)
    writer.suspend()
    attempt.wait_for(SaveStarted, lambda event: event.checkpoint.endswith("-s2"))
    attempt.wait_for(SaveDelayed)
    writer.resume()


def test_a_disk_that_is_full_before_the_claim_stops_the_attempt(
    disk: SmallDisk, large_spec: TrainSpec, forks: AttemptForks
) -> None:
    """Without room for a claim the attempt ends with 1, and leaves no part of a record."""
    disk.fill(leaving=0)
    outcome = forks.run(large_spec).outcome
    assert outcome.code == EXIT_FAILED
    assert "No space left" in outcome.message
    assert contents(Path(large_spec.config.store.url)) == {}
