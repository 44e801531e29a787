"""The registry away, its publisher killed, the trainer killed: all is published, and once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from support.attempt_forks import AttemptForks, Kill
from support.launches import TOY, Launch, launched, wait_until
from support.mlflow_server import MlflowServer
from support.run_checks import check_run
from support.toy_runs import STEPS, Digest, toy_spec

from ckpt_tasks.config import RegistryConfig, ScheduleConfig
from ckpt_tasks.events import (
    AttemptResumed,
    CheckpointCommitted,
    CheckpointRegistered,
    MetricsReplayed,
    Progress,
    RegistryUnavailable,
)
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED

EXPERIMENT = "toys"
DRIFTING = TOY.with_name("toy_drifting.py")


@pytest.fixture
def server(_migrated_database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    """An MLflow server that this test stops and starts; stopped at first."""
    server = MlflowServer(tmp_path / "server")
    server.folder.mkdir()
    (server.folder / "mlflow.db").write_bytes(_migrated_database.read_bytes())
    yield server
    server.stop()


def _registering(spec: TrainSpec, uri: str) -> TrainSpec:
    registry = RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT)
    config = msgspec.structs.replace(spec.config, registry=registry)
    return msgspec.structs.replace(spec, config=config)


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training, named by its file."""
    return toy_spec(root, entrypoint=f"{TOY}:train")


def _check_published(spec: TrainSpec, backend: str, *, steps: int = STEPS) -> None:
    """One run, finished; every step's loss once; every valid checkpoint once, in order."""
    client = MlflowClient(backend)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, steps + 1))
    valid = [str(checkpoint) for checkpoint in check_run(spec)]
    versions = client.search_model_versions(f"name='{EXPERIMENT}'")
    models = [_model_of(client, version) for version in versions]
    assert sorted(_checkpoint_of(model.params) for model in models) == sorted(valid)
    assert len(versions) == len(valid)
    (alias,) = client.get_registered_model(EXPERIMENT).aliases
    newest = client.get_model_version_by_alias(EXPERIMENT, alias)
    assert _checkpoint_of(_model_of(client, newest).params) == valid[-1]


def _model_of(client: MlflowClient, version: ModelVersion) -> LoggedModel:
    return client.get_logged_model(version.source.removeprefix("models:/"))


def _checkpoint_of(params: dict[str, str]) -> str:
    return params["uri"].rpartition("/")[2].removesuffix(".json")


def test_training_goes_on_while_the_registry_is_away(
    spec: TrainSpec,
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are done while the server is stopped; once it is back, everything is there, once."""
    trace = tmp_path / "trace"
    monkeypatch.setenv("TOY_TRACE", str(trace))
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    server.start()
    with launched(_registering(spec, server.uri)) as attempt:
        attempt.wait_for(CheckpointRegistered)
        server.stop()
        before = _lines(trace)
        attempt.wait_for(RegistryUnavailable)
        wait_until(lambda: _lines(trace) >= min(before + 5, STEPS), "steps without a registry")
        server.start()
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, attempt.output
    _check_published(spec, server.backend_uri)


def _lines(trace: Path) -> int:
    return len(trace.read_text("ascii").splitlines())


def test_a_second_attempt_publishes_what_the_first_could_not(
    spec: TrainSpec, forks: AttemptForks, mlflow_database: str
) -> None:
    """Checkpoints keep their metrics, so that an attempt without a registry leaves no gap."""
    assert forks.run(spec, kill=Kill(step=13)).killed
    with launched(_registering(spec, mlflow_database)) as attempt:
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, attempt.output
    _check_published(spec, mlflow_database)


def test_a_complete_run_is_published_late(
    spec: TrainSpec, forks: AttemptForks, mlflow_database: str
) -> None:
    """Started once more, a complete run trains nothing, and is registered as what it is."""
    assert forks.run(spec).outcome.code == EXIT_DONE
    with launched(_registering(spec, mlflow_database)) as attempt:
        outcome = attempt.outcome()
        assert outcome.code == EXIT_DONE, attempt.output
    assert "complete already" in outcome.message
    _check_published(spec, mlflow_database)


def test_one_run_and_every_step_once_after_kills(
    spec: TrainSpec,
    mlflow_database: str,
    digest: Digest,
    expected_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer killed twice, registrar once: one run, all steps, no divergence, same end."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.5")
    for name, value in digest.environment.items():
        monkeypatch.setenv(name, value)
    registering = _registering(spec, mlflow_database)
    with launched(registering) as first:
        first.wait_for(CheckpointRegistered)
        first.registrar.kill()
        _kill_beyond(first, 8)
    with launched(registering) as second:
        resumed = second.wait_for(AttemptResumed)
        assert resumed.checkpoint == first.of(CheckpointCommitted)[-1].checkpoint
        assert resumed.lost_steps >= 0
        _kill_beyond(second, 17)
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    with launched(registering) as third:
        outcome = third.outcome()
        assert outcome.code == EXIT_DONE, third.output
    assert digest.read() == expected_digest
    assert sum(event.diverged for event in second.of(MetricsReplayed)) == 0
    assert sum(event.diverged for event in third.of(MetricsReplayed)) == 0
    check_run(spec, steps=STEPS)
    _check_published(spec, mlflow_database)


def _kill_beyond(attempt: Launch, step: int) -> None:
    attempt.wait_for(Progress, lambda event: event.position.step > step)
    attempt.trainer.kill()
    assert attempt.outcome().code == EXIT_FAILED


def test_steps_that_came_out_differently_are_counted(
    spec: TrainSpec, mlflow_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed steps of a training that is not deterministic are compared, told, and not sent."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.5")
    schedule = ScheduleConfig(every_epochs=1)
    config = msgspec.structs.replace(spec.config, schedule=schedule)
    drifting = msgspec.structs.replace(
        spec, entrypoint=f"{DRIFTING}:train", config=config, params={"epochs": 2}
    )
    registering = _registering(drifting, mlflow_database)
    with launched(registering) as first:
        first.wait_for(Progress, lambda event: event.position.step % 8 >= 2)
        first.trainer.kill()
        assert first.outcome().code == EXIT_FAILED
    lost = max(event.position.step for event in first.of(Progress))
    lost -= max((event.position.step for event in first.of(CheckpointCommitted)), default=0)
    assert lost
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    with launched(registering) as second:
        outcome = second.outcome()
        assert outcome.code == EXIT_DONE, second.output
    assert second.wait_for(AttemptResumed).lost_steps == lost
    replayed = second.of(MetricsReplayed)
    assert sum(event.diverged for event in replayed) == lost
    assert sum(event.compared for event in replayed) == 2 * lost
    assert {key for event in replayed for key in event.keys} == {"loss"}
    _check_published(drifting, mlflow_database, steps=16)
