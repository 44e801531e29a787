"""The main job with a store on a real S3 server and MLflow behind HTTP."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import toy_training
from support.mlflow_server import MlflowServer
from support.s3_servers import S3Server

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import AttemptClaimed, AttemptResumed, CheckpointCommitted, Event
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

STEPS = 16


def spec(store: StoreConfig, run: str, tracking_uri: str | None) -> TrainSpec:
    return TrainSpec(
        entrypoint=f"{toy_training.__file__}:train",
        run=run,
        params={"epochs": 2},
        invocation=f"invocation of {run}",
        config=CheckpointConfig(
            store=store,
            schedule=ScheduleConfig(every_steps=5),
            registry=RegistryConfig(tracking_uri=tracking_uri, experiment="on s3"),
        ),
    )


def killed_after(commits: int, what: TrainSpec) -> tuple[TrainOutcome, list[Event]]:
    """Launch once, and kill the trainer with SIGKILL once it has committed that often."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        done = sum(isinstance(e, CheckpointCommitted) for e in events)
        if isinstance(event, CheckpointCommitted) and done == commits:
            (pid,) = [e.pid for e in events if isinstance(e, AttemptClaimed)]
            os.kill(pid, signal.SIGKILL)

    return launch(what, on_event), events


@pytest.mark.usefixtures("s3_credentials")
def test_a_killed_training_goes_on_from_its_last_checkpoint_on_s3(
    seaweedfs: S3Server,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Same end as an uninterrupted one on disk; every checkpoint is verified and registered."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    bucket, prefix = seaweedfs.new_place()
    store = StoreConfig(url=f"s3://{bucket}/{prefix}", options={"endpoint_url": seaweedfs.endpoint})
    on_s3 = spec(store, "killed", mlflow_server.uri)

    first, events = killed_after(1, on_s3)
    assert first.code == 1
    assert "SIGKILL" in first.message
    second = launch(on_s3, events.append)
    assert second.done, second.message

    resumed = [event for event in events if isinstance(event, AttemptResumed)]
    committed = [event.checkpoint for event in events if isinstance(event, CheckpointCommitted)]
    assert resumed[0].checkpoint is None
    assert resumed[1].checkpoint in committed
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    whole = spec(StoreConfig(url=str(tmp_path / "store")), "whole", None)
    assert launch(whole).done
    with open_store(store) as s3, open_store(whole.config.store) as disk:
        view = view_run(s3, "killed")
        valid = [c.id for c in view.checkpoints if c.standing == "valid"]
        assert all(verify_checkpoint(s3, "killed", checkpoint).ok for checkpoint in valid)
        expected = state_digest(disk, "whole", str(launch(whole).checkpoint))
        assert state_digest(s3, "killed", valid[0]) == expected
    _check_registered(mlflow_server.uri, valid)


def _check_registered(uri: str, valid: list[str]) -> None:
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = client.search_model_versions("name='on s3'")
    models = [client.get_logged_model(v.source.removeprefix("models:/")) for v in versions]
    uris = sorted(model.params["uri"] for model in models)
    assert [u.rpartition("/")[2].removesuffix(".json") for u in uris] == sorted(valid)
    assert all(u.startswith("s3://") for u in uris)
    (run,) = client.search_runs([client.get_experiment_by_name("on s3").experiment_id])
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, STEPS + 1))
