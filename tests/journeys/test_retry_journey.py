"""One failed run's way to its retry, as an orchestrator leads it.

resolve, recover, train; the trainer is killed; the orchestrator calls the same step again with
the same words; a new attempt is claimed, goes on from the last committed checkpoint, and ends as
if nothing had happened.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.run_checks import check_run
from support.toy_runs import EPOCHS, SCHEDULE, STEPS

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, StoreConfig
from ckpt_tasks.errors import AttemptFailedError
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptEnded,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointRegistered,
    Event,
    MetricsLogged,
)
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import CheckpointId

pytestmark = pytest.mark.timeout(300)

TESTS = Path(__file__).parents[1]
PACE = "0.25"  # seconds of a step, so that there is a midst in which to be killed
TURNING_POINTS = (AttemptClaimed, AttemptResumed, CheckpointCommitted, AttemptEnded)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the children inherit: where the toy is found, and nothing of this machine's MLflow."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


@pytest.fixture
def mlflow(tmp_path: Path, environment: pytest.MonkeyPatch) -> MlflowClient:
    """A database with its tables, which take long to make."""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    return client


def resolved(folder: Path, *, registry: RegistryConfig | None = None) -> TrainSpec:
    """Step 1."""
    return tasks.resolve(
        "support.toy_training:train",
        run="toy",
        params={"epochs": EPOCHS},
        config=CheckpointConfig(
            store=StoreConfig(url=str(folder / "store")),
            schedule=SCHEDULE,
            registry=registry or RegistryConfig(),
        ),
        invocation="flow-run-1",
    )


def uninterrupted_digest(folder: Path, environment: pytest.MonkeyPatch) -> str:
    """The end of the training that nothing happens to."""
    environment.setenv("TOY_DIGEST", str(folder / "expected"))
    assert tasks.train(resolved(folder / "uninterrupted")).done
    return (folder / "expected").read_text("ascii")


def train_and_kill(spec: TrainSpec) -> list[Event]:
    """Step 3, whose trainer is killed by SIGKILL once it has committed two checkpoints."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        commits = [e for e in events if isinstance(e, CheckpointCommitted)]
        if len(commits) == 2 and event is commits[-1]:
            (claimed,) = [e for e in events if isinstance(e, AttemptClaimed)]
            os.kill(claimed.pid, signal.SIGKILL)

    with pytest.raises(AttemptFailedError, match="SIGKILL") as caught:
        tasks.train(spec, on_event)
    assert tasks.is_worth_retrying(caught.value)
    return events


def committed(events: list[Event]) -> list[str]:
    return [e.checkpoint for e in events if isinstance(e, CheckpointCommitted)]


def registered(events: list[Event]) -> list[str]:
    return [e.checkpoint for e in events if isinstance(e, CheckpointRegistered)]


def test_killed_training_goes_on(
    tmp_path: Path, mlflow: MlflowClient, environment: pytest.MonkeyPatch
) -> None:
    """The retry is attempt 2, starts from the last commit, trains only what is missing, ends bit
    for bit like a training never killed, and is one run with one version a checkpoint in MLflow.
    """
    expected = uninterrupted_digest(tmp_path, environment)
    registry = RegistryConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="journey")
    spec = resolved(tmp_path, registry=registry)
    before = tasks.recover(spec)
    assert (before.checkpoint, before.attempts) == (None, 0)

    environment.setenv("TOY_DIGEST", str(tmp_path / "digest"))
    environment.setenv("TOY_STEP_SECONDS", PACE)
    first = train_and_kill(spec)

    offered = tasks.recover(spec)
    assert offered.checkpoint == committed(first)[-1]
    environment.setenv("TOY_STEP_SECONDS", "0")
    second: list[Event] = []
    outcome = tasks.train(spec, second.append)

    assert outcome.done
    assert outcome.attempt == 2
    assert_first_attempt(first)
    assert_second_attempt(second, start=committed(first)[-1], step=offered.step)
    assert tasks.verify(spec.config.store, spec.run).ok
    assert (tmp_path / "digest").read_text("ascii") == expected
    check_run(spec, steps=STEPS)
    assert Counter(registered(first) + registered(second)) == Counter(
        committed(first) + committed(second)
    )
    assert_mlflow(mlflow, committed(first) + committed(second))


def assert_first_attempt(events: list[Event]) -> None:
    """It is claimed, starts at the beginning, commits, and says no more."""
    turns = [event for event in events if isinstance(event, TURNING_POINTS)]
    claimed, resumed, *commits = turns
    assert isinstance(claimed, AttemptClaimed)
    assert isinstance(resumed, AttemptResumed)
    assert (claimed.attempt, resumed.checkpoint) == (1, None)
    assert len(commits) >= 2
    assert {type(event) for event in commits} == {CheckpointCommitted}


def assert_second_attempt(events: list[Event], *, start: str, step: int) -> None:
    """It is claimed, then it picks its checkpoint, then it trains from there to its end."""
    turns = [event for event in events if isinstance(event, TURNING_POINTS)]
    claimed, resumed, *commits, ended = turns
    assert isinstance(claimed, AttemptClaimed)
    assert isinstance(resumed, AttemptResumed)
    assert isinstance(ended, AttemptEnded)
    assert (claimed.attempt, claimed.invocation) == (2, "flow-run-1")
    assert (resumed.checkpoint, resumed.position.step) == (start, step)
    assert {type(event) for event in commits} == {CheckpointCommitted}
    assert (ended.code, ended.attempt) == (0, 2)
    logged = [row[2] for e in events if isinstance(e, MetricsLogged) for row in e.rows]
    assert (min(logged), max(logged)) == (step + 1, STEPS)


def assert_mlflow(mlflow: MlflowClient, checkpoints: list[str]) -> None:
    """One run, finished; each step's loss once; each checkpoint one version."""
    experiment = mlflow.get_experiment_by_name("journey")
    assert experiment is not None
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = mlflow.get_metric_history(run.info.run_id, "loss")
    assert Counter(metric.step for metric in history) == Counter(range(1, STEPS + 1))
    versions = mlflow.search_model_versions("name = 'journey'")
    steps = [CheckpointId.parse(checkpoint).step for checkpoint in checkpoints]
    assert Counter(int(version.tags["ckpt.step"]) for version in versions) == Counter(steps)
    assert {version.run_id for version in versions} == {run.info.run_id}
