"""Aliases of a registered model in MLflow: set, and read with what they point at."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.connection import Connection, error_code
from ckpt_tasks.registry import AliasHolder, Registration
from ckpt_tasks.types import Number

__all__ = ["CHECKPOINT_TAG", "Aliases", "value_tags"]

CHECKPOINT_TAG = "ckpt.checkpoint"
_VALUE_TAG = "ckpt.value/"  # + MLflow's key of a metric: the checkpoint's own value


def value_tags(metrics: Mapping[str, Number], metric: str | None) -> dict[str, str]:
    """The logged model's tag with the value by which the alias ``best`` is compared.

    The model's metric may be missing: it shows the run's row, which an earlier attempt may have
    sent with another value.
    """
    if metric is None or metric not in metrics:
        return {}
    return {f"{_VALUE_TAG}{names.key(metric)}": repr(float(metrics[metric]))}


class Aliases:
    """Aliases of one registered model.

    Parameters
    ----------
    registered_model
        Its name; it need not exist yet.
    """

    def __init__(self, connection: Connection, registered_model: str) -> None:
        self._connection = connection
        self._registered_model = registered_model

    def set(self, alias: str, registration: Registration) -> None:
        """Point an alias at a version; nothing is written when it points there already."""
        client = self._connection.client
        name, version = registration.registered_model, str(registration.version)
        alias = names.alias(alias)
        before = client.get_registered_model(name).aliases.get(alias)
        if str(before) == version:
            return
        try:
            client.set_registered_model_alias(name, alias, version)
        except MlflowException:
            # Of two who set a new alias at once, both add it, and the database refuses one.
            if before is not None or alias not in client.get_registered_model(name).aliases:
                raise
            client.set_registered_model_alias(name, alias, version)

    def holder(self, alias: str, metric: str) -> AliasHolder | None:
        """What an alias points at; ``None`` where the version or its logged model is gone."""
        client, name = self._connection.client, self._registered_model
        try:
            number = client.get_registered_model(name).aliases.get(names.alias(alias))
            if number is None:
                return None
            version = client.get_model_version(name, str(number))
            model = self._logged_model(version)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return AliasHolder(
            run_id=str(version.run_id),
            checkpoint=model.tags.get(CHECKPOINT_TAG) if model is not None else None,
            value=_value(model, names.key(metric)) if model is not None else None,
        )

    def _logged_model(self, version: ModelVersion) -> LoggedModel | None:
        scheme, _, model_id = str(version.source).partition("models:/")
        if scheme or not model_id.startswith("m-"):
            return None  # a version that somebody made of something else
        return self._connection.client.get_logged_model(model_id)


def _value(model: LoggedModel, key: str) -> float | None:
    values = {metric.key: float(metric.value) for metric in model.metrics or ()}
    try:
        return float(model.tags[f"{_VALUE_TAG}{key}"])
    except (KeyError, ValueError):  # registered for another metric, or edited by somebody
        return values.get(key)
