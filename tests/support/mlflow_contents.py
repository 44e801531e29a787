"""All that MLflow holds of the only run of an experiment, for comparison with another."""

from __future__ import annotations

import json
import re
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")
_DIGITS = re.compile(r"\b[0-9a-f]{32,64}\b")


def contents_of(uri: str, experiment: str, *, store: str, times: bool = True) -> dict[str, Any]:
    """Params, tags, metrics, logged models, versions, aliases, outputs and artifacts.

    Ids are left out, and the store's address; of versions only the order counts.

    Parameters
    ----------
    times
        Without them, also what else differs between two trainings of the same: uid and digests.
    """
    client = MlflowClient(uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    models = {m.model_id: m for m in client.search_logged_models([found.experiment_id])}
    versions = client.search_model_versions(
        f"name = '{experiment}'", order_by=["version_number ASC"]
    )
    order = [int(version.version) for version in versions]
    told = {
        "run": _run(client, run),
        "models": sorted((_model(m, order) for m in models.values()), key=repr),
        "versions": [_version(v, models) for v in versions],
        "aliases": _aliases(client, experiment, models),
        "outputs": sorted(
            (models[output.model_id].tags["ckpt.checkpoint"], output.step)
            for output in run.outputs.model_outputs
        ),
        "artifacts": sorted(a.path for a in client.list_artifacts(run.info.run_id, "checkpoints")),
    }
    text = json.dumps(told, indent=1).replace(store, "STORE")
    if not times:
        text = _DIGITS.sub("DIGITS", _TIME.sub("TIME", text))
        text = re.sub(r'"at": \d+', '"at": 0', text)
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _run(client: MlflowClient, run: Run) -> dict[str, Any]:
    keys = sorted(run.data.metrics)
    rows = {key: client.get_metric_history(run.info.run_id, key) for key in keys}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "metrics": {
            key: [
                {"step": row.step, "value": row.value, "at": row.timestamp}
                for row in sorted(history, key=lambda row: row.step)
            ]
            for key, history in rows.items()
        },
    }


def _model(model: LoggedModel, order: list[int]) -> dict[str, Any]:
    versions = json.loads(model.tags["mlflow.modelVersions"])
    return {
        "name": model.name,
        "status": str(model.status),
        "type": model.model_type,
        "params": model.params,
        "tags": {key: value for key, value in model.tags.items() if key != "mlflow.modelVersions"},
        "versions": [order.index(int(version["version"])) for version in versions],
        "metrics": [
            {"key": m.key, "value": m.value, "step": m.step, "at": m.timestamp}
            for m in sorted(model.metrics or (), key=lambda m: m.key)
        ],
    }


def _version(version: ModelVersion, models: dict[str, LoggedModel]) -> dict[str, Any]:
    return {
        "checkpoint": models[version.source.removeprefix("models:/")].tags["ckpt.checkpoint"],
        "tags": version.tags,
        "description": version.description,
    }


def _aliases(
    client: MlflowClient, registered_model: str, models: dict[str, LoggedModel]
) -> dict[str, str]:
    aliases = client.get_registered_model(registered_model).aliases
    versions = {
        alias: client.get_model_version_by_alias(registered_model, alias) for alias in aliases
    }
    return {
        alias: models[version.source.removeprefix("models:/")].tags["ckpt.checkpoint"]
        for alias, version in versions.items()
    }
