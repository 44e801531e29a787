"""A training that keeps its latest: MLflow shows what is left, and nothing that is gone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient
from support.launches import TOY, launched
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import (
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    SaveConfig,
    StoreConfig,
)
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.events import Warned
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import retain
from ckpt_tasks.types import EXIT_DONE

EXPERIMENT = "kept"


def test_registry_shows_what_is_left(tmp_path: Path) -> None:
    """By the attempt itself, then by the flow's step: versions and logged models go with the
    checkpoints; what an alias holds stays; and where MLflow is away, nothing is marked.
    """
    uri, root = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "store"
    spec = toy_spec(root, entrypoint=f"{TOY}:train")
    config = msgspec.structs.replace(
        spec.config,
        retention=RetentionConfig(latest=2),
        registry=RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT),
        save=SaveConfig(asynchronous=False),
    )
    with launched(msgspec.structs.replace(spec, config=config)) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
        assert not [w for w in attempt.of(Warned) if "retention" in w.message]
    client = MlflowClient(tracking_uri=uri)
    expired = standing(root, "expired")
    assert expired
    oldest = expired[-1]
    (version,) = [v.version for v in versions(client) if checkpoint_of(client, v) == oldest]
    client.set_registered_model_alias(EXPERIMENT, "mine", version)

    away = replace_registry(config, f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    with pytest.raises(RegistryError):
        retain(away, spec.run)
    now = msgspec.structs.replace(config, retention=RetentionConfig(latest=2, grace=0.001))
    report = retain(now, spec.run)

    assert sorted(report.collected.removed) == sorted(expired[:-1])
    assert [(k.checkpoint, k.why) for k in report.collected.kept] == [(oldest, "alias 'mine'")]
    left = {oldest, *standing(root, "valid")}
    assert {checkpoint_of(client, version) for version in versions(client)} == left
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.tags["ckpt.checkpoint"] for model in models} == left


def standing(root: Path, kind: str) -> list[str]:
    """Checkpoints of one standing, newest first."""
    with closing(open_store(StoreConfig(url=str(root)))) as store:
        return [c.id for c in view_run(store, "toy").checkpoints if c.standing == kind]


def replace_registry(config: CheckpointConfig, uri: str) -> CheckpointConfig:
    registry = RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT)
    return msgspec.structs.replace(config, registry=registry)


def versions(client: MlflowClient) -> list:
    return list(client.search_model_versions(f"name = '{EXPERIMENT}'"))


def checkpoint_of(client: MlflowClient, version: object) -> str:
    model_id = version.source.removeprefix("models:/")  # type: ignore[attr-defined]
    return client.get_logged_model(model_id).tags["ckpt.checkpoint"]
