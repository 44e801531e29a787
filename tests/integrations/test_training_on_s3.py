"""The main job with a store on a real S3 server and MLflow behind HTTP."""

from __future__ import annotations

import os
import signal

import msgspec
import pytest
from mlflow import MlflowClient
from support import toy_training
from support.mlflow_server import MlflowServer
from support.s3_link import Link, s3_link
from support.s3_servers import S3Server

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    Event,
    SaveStarted,
)
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

STEPS = 16
FLAKY = Link(delay=0.01, busy=0.05, cut=0.05, drop_answer=0.05, seed=7)


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state with which a training on disk ends, to which nothing ever happened."""
    whole = spec(StoreConfig(url=str(tmp_path_factory.mktemp("whole"))), "whole", None)
    outcome = launch(whole)
    with open_store(whole.config.store) as disk:
        return state_digest(disk, "whole", str(outcome.checkpoint))


def killed_after(
    times: int, what: TrainSpec, kind: type[Event]
) -> tuple[TrainOutcome, list[Event]]:
    """Launch once, and kill the trainer with SIGKILL at that many events of a class."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, kind) and sum(isinstance(e, kind) for e in events) == times:
            (pid,) = [e.pid for e in events if isinstance(e, AttemptClaimed)]
            os.kill(pid, signal.SIGKILL)

    return launch(what, on_event), events


@pytest.mark.usefixtures("s3_credentials")
def test_a_killed_training_goes_on_from_its_last_checkpoint_on_s3(
    seaweedfs: S3Server,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
) -> None:
    """Same end as an uninterrupted one on disk; every checkpoint is verified and registered.

    The retry aborts what the killed attempt was uploading, however young, and nothing else.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    bucket, prefix = seaweedfs.new_place()
    store = StoreConfig(url=f"s3://{bucket}/{prefix}", options={"endpoint_url": seaweedfs.endpoint})
    on_s3 = spec(store, "killed", mlflow_server.uri)

    first, events = killed_after(1, on_s3, CheckpointCommitted)
    assert first.code == 1
    assert "SIGKILL" in first.message
    dead, later, other = (
        f"{prefix}/{name}/model.rank0000.safetensors"
        for name in ("killed/data/a0001-s0009-dead", "killed/data/a0009-s0001-live", "x/data/a0001")
    )
    for key in (dead, later, other):
        seaweedfs.client().create_multipart_upload(Bucket=bucket, Key=key)
    second = launch(on_s3, events.append)
    assert second.done, second.message
    left = seaweedfs.client().list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/")
    assert {upload["Key"] for upload in left["Uploads"]} == {later, other}

    resumed = [event for event in events if isinstance(event, AttemptResumed)]
    committed = [event.checkpoint for event in events if isinstance(event, CheckpointCommitted)]
    assert resumed[0].checkpoint is None
    assert resumed[1].checkpoint in committed
    valid = _check_checkpoints(on_s3, undisturbed)
    _check_registered(mlflow_server.uri, valid)


@pytest.mark.usefixtures("s3_credentials")
def test_a_flaky_link_to_s3_costs_a_killed_training_nothing(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    """Saves go on beside training while requests are refused, cut, or done and not answered.

    The trainer is killed as a save begins: it is a checkpoint that verifies, or there is none.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    bucket, prefix = seaweedfs.new_place()
    with s3_link(seaweedfs.endpoint, FLAKY) as link:
        options = {"endpoint_url": link.endpoint}
        on_s3 = spec(StoreConfig(url=f"s3://{bucket}/{prefix}", options=options), "flaky", None)
        first, events = killed_after(2, on_s3, SaveStarted)
        assert (first.code, "SIGKILL" in first.message) == (1, True)
        second = launch(on_s3, events.append)
        assert second.done, second.message
        fates = link.fates()
    committed = [event.checkpoint for event in events if isinstance(event, CheckpointCommitted)]
    resumed = [event.checkpoint for event in events if isinstance(event, AttemptResumed)]
    assert resumed[0] is None
    assert resumed[1] in committed
    assert fates.keys() >= {"busy", "cut", "drop_answer"}
    behind = msgspec.structs.replace(
        on_s3.config.store, options={"endpoint_url": seaweedfs.endpoint}
    )
    config = msgspec.structs.replace(on_s3.config, store=behind)
    assert sorted(
        _check_checkpoints(msgspec.structs.replace(on_s3, config=config), undisturbed)
    ) == (sorted(committed))


def _check_checkpoints(what: TrainSpec, end: str) -> list[str]:
    """Assert that all are whole and that the newest is the `end`; the valid ones, newest first."""
    with open_store(what.config.store) as store:
        view = view_run(store, what.run)
        assert all(verify_checkpoint(store, what.run, c.id).ok for c in view.checkpoints)
        valid = [c.id for c in view.checkpoints if c.standing == "valid"]
        assert state_digest(store, what.run, valid[0]) == end
    return valid


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
