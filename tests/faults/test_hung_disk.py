"""A store on a file system that stops answering, as a network's may: nobody waits for ever."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import psutil
import pytest
from support.hung_disk import hung_disk
from support.launches import TOY, is_alive, launched, wait_until, writer_of
from support.run_checks import check_run
from support.toy_runs import toy_spec

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.events import AttemptResumed, CheckpointCommitted, SaveFailed
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_FAILED

UNPROTECTED = 1.5
"""Seconds."""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """A training that saves often and has no end."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("only root mounts file systems, and FUSE's where the kernel has it")
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.05")
    spec = toy_spec(tmp_path / "store", entrypoint=f"{TOY}:train", params={"epochs": 10_000})
    attempt = msgspec.structs.replace(
        spec.config.attempt, max_unprotected=UNPROTECTED, grace=1.0, drain=1.0
    )
    config = msgspec.structs.replace(
        spec.config, schedule=ScheduleConfig(every_steps=5), attempt=attempt
    )
    return msgspec.structs.replace(spec, config=config)


def test_a_disk_that_hangs_ends_the_attempt_and_costs_no_checkpoint(spec: TrainSpec) -> None:
    """Writer and registrar cannot even be killed there. The attempt fails all the same, while the
    disk still hangs, so that the orchestrator hears of it; once it answers, a retry goes on from
    the newest checkpoint.
    """
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        writer = writer_of(attempt.trainer)
        with hung_disk(Path(spec.config.store.url)) as disk:
            wait_until(lambda: bool(disk.waiting), "a writer that waits for the disk")
            outcome = attempt.outcome()
            assert writer.status() == psutil.STATUS_DISK_SLEEP
        assert outcome.code == EXIT_FAILED, outcome
        assert "not written within" in outcome.message
        assert attempt.of(SaveFailed)
        newest = attempt.of(CheckpointCommitted)[-1].checkpoint
    wait_until(lambda: not is_alive(writer), "the end of the writer")
    assert str(check_run(spec)[-1]) == newest
    with launched(spec) as retry:
        assert retry.wait_for(AttemptResumed).checkpoint == newest
        retry.wait_for(CheckpointCommitted)
    check_run(spec)
