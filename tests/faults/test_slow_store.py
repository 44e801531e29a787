"""A store that takes minutes for what it takes seconds for: training goes on beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
from support.launches import TOY, launched, wait_until
from support.run_checks import check_run
from support.s3_proxy import Faults, Request, s3_proxy
from support.s3_servers import S3Server
from support.toy_runs import toy_spec

from ckpt_tasks.config import ScheduleConfig, StoreConfig
from ckpt_tasks.events import CheckpointCommitted, Progress, SaveDelayed, SaveFailed, SaveStarted
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_BUSY, EXIT_FAILED, CheckpointId

GRACE = 3.0
"""Seconds."""


@pytest.fixture
def held(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainSpec, Faults]]:
    """A training on S3, behind a proxy that can hold its data back."""
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    with s3_proxy(moto_server) as (server, faults):
        bucket, place = moto_server.new_place()
        url, options = f"s3://{bucket}/{place}", {"endpoint_url": server.endpoint}
        spec = toy_spec("unused", entrypoint=f"{TOY}:train", params={"epochs": 10_000})
        attempt = msgspec.structs.replace(
            spec.config.attempt, heartbeat=0.5, takeover_after=5.0, grace=GRACE
        )
        config = msgspec.structs.replace(
            spec.config,
            store=StoreConfig(url=url, options=options),
            schedule=ScheduleConfig(every_steps=5),
            attempt=attempt,
        )
        yield msgspec.structs.replace(spec, config=config), faults


def _is_data(request: Request) -> bool:
    return request.method == "PUT" and "/data/" in request.path


def test_a_save_that_takes_minutes_holds_nothing_up(
    held: tuple[TrainSpec, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are done and the heart beats, so that no other invocation takes the run over; asked
    to stop, training waits for its grace and no longer, and the save still becomes a checkpoint.
    """
    spec, faults = held
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.05")
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        faults.holds = _is_data
        wait_until(lambda: bool(faults.held), "a request that is held")
        held_save = attempt.wait_for(SaveStarted, lambda event: _is_of(event, faults)).checkpoint
        attempt.wait_for(SaveDelayed, lambda event: event.behind == held_save)
        step, beats = attempt.of(Progress)[-1].position.step, _beats(faults)
        other = msgspec.structs.replace(spec, invocation="flow-run-2")
        with launched(other) as rival:
            assert rival.outcome().code == EXIT_BUSY, rival.output
        assert attempt.of(Progress)[-1].position.step > step + 10
        assert _beats(faults) > beats
        assert attempt.of(SaveFailed) == []
        assert attempt.is_running
        asked = time.monotonic()
        attempt.request_stop()
        outcome = attempt.outcome()
        assert outcome.code == EXIT_FAILED
        assert "may yet become a checkpoint" in outcome.message
        assert time.monotonic() - asked >= 0.9 * GRACE
        assert held_save not in map(str, check_run(spec))
        faults.let_go()
        wait_until(lambda: held_save in map(str, check_run(spec)), "the checkpoint after all")


def _is_of(event: SaveStarted, faults: Faults) -> bool:
    """Whether it tells of the save whose data is held."""
    sequence = CheckpointId.parse(event.checkpoint).sequence
    return f"/data/a0001-s{sequence:04d}-" in faults.held[0].path


def _beats(faults: Faults) -> int:
    return sum("heartbeat" in request.path for request in list(faults.seen))
