"""What must hold of a run in MLflow, whatever happened to the attempts that published it."""

from __future__ import annotations

from typing import Any

import msgspec
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from support.run_checks import check_run
from support.toy_runs import STEPS

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.store import open_store
from ckpt_tasks.training.spec import TrainSpec

EXPERIMENT = "toys"


def with_registry(spec: TrainSpec, uri: str, **settings: Any) -> TrainSpec:
    """`spec` with a registry."""
    registry = RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT, **settings)
    config = msgspec.structs.replace(spec.config, registry=registry)
    return msgspec.structs.replace(spec, config=config)


def note_of(backend: str) -> str:
    """The Markdown that a person reads on the page of the only run."""
    return str(run_of(backend).data.tags["mlflow.note.content"])


def run_of(backend: str) -> Run:
    """The only run."""
    client = MlflowClient(backend)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def check_published(spec: TrainSpec, backend: str, *, steps: int = STEPS) -> None:
    """One run, finished; every step's loss once; every valid checkpoint once, in order, those
    that attempts went on from among them.
    """
    client = MlflowClient(backend)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, steps + 1))
    valid = [str(checkpoint) for checkpoint in check_run(spec)]
    versions = client.search_model_versions(f"name='{EXPERIMENT}'")
    registered = [_checkpoint_of(_model_of(client, version).params) for version in versions]
    assert sorted(registered) == sorted(valid)
    assert _starts(spec) <= set(registered)
    assert len(versions) == len(valid)
    (alias,) = client.get_registered_model(EXPERIMENT).aliases
    newest = client.get_model_version_by_alias(EXPERIMENT, alias)
    assert _checkpoint_of(_model_of(client, newest).params) == valid[-1]


def _starts(spec: TrainSpec) -> set[str]:
    """The checkpoints that attempts went on from."""
    with open_store(spec.config.store) as store:
        attempts = view_run(store, spec.run).attempts
    starts = (attempt.resumed.checkpoint for attempt in attempts if attempt.resumed is not None)
    return {checkpoint for checkpoint in starts if checkpoint is not None}


def _model_of(client: MlflowClient, version: ModelVersion) -> LoggedModel:
    return client.get_logged_model(version.source.removeprefix("models:/"))


def _checkpoint_of(params: dict[str, str]) -> str:
    return params["uri"].rpartition("/")[2].removesuffix(".json")
