"""What an asset's event says of a checkpoint, so that other DAGs are scheduled by a new model."""

from __future__ import annotations

from typing import Any

import msgspec
from airflow.sdk import Asset, AssetAlias, BaseOperator, Context

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.format.layout import encode_name

__all__ = ["checkpoint_extra", "run_asset", "tell_outlets"]


def run_asset(run: str) -> Asset:
    """The asset of a training run: the same for the DAG that trains and those that wait for it.

    Parameters
    ----------
    run
        The run's name; or, where each triggered execution is a run of its own, the DAG's.
    """
    return Asset(name=run, uri=f"x-ckpt-tasks://{encode_name(run)}", group="ckpt_tasks")


def checkpoint_extra(found: tasks.FoundCheckpoint) -> dict[str, Any]:
    """A checkpoint as events and XComs tell it: where it lies, and what the registry calls it."""
    extra: dict[str, Any] = msgspec.to_builtins(found.checkpoint)
    registration = found.registration
    if registration is not None:
        extra.update(
            mlflow_run_id=registration.run_id,
            model_id=registration.model_id,
            registered_model=registration.registered_model,
            version=registration.version,
        )
    return extra


def tell_outlets(
    operator: BaseOperator,
    context: Context,
    config: CheckpointConfig,
    run: str,
    checkpoint: str,
    **registered: str,
) -> None:
    """Say in the events of the task's outlets which checkpoint they are about.

    An outlet that is an alias gets the event of the run's own asset.

    Parameters
    ----------
    registered
        What the registry calls it: ``mlflow_run_id``, ``model_id``, ``registered_model``,
        ``version``. Where the caller knows no version, the registry is asked.
    """
    if not operator.outlets:
        return
    located = tasks.locate(config.store, run, checkpoint)
    extra: dict[str, Any] = {**msgspec.to_builtins(located), **registered}
    if "version" not in registered and config.registry.tracking_uri is not None:
        extra.update(_registered(operator, config, run, checkpoint))
    for outlet in operator.outlets:
        event = context["outlet_events"][outlet]
        if isinstance(outlet, AssetAlias):
            event.add(run_asset(run), extra)
        else:
            event.extra = extra


def _registered(
    operator: BaseOperator, config: CheckpointConfig, run: str, checkpoint: str
) -> dict[str, Any]:
    """A registry that is away delays no event: the checkpoint is there all the same."""
    try:
        found = tasks.find(config, tasks.parse_wanted(run))
    except RegistryError as error:
        operator.log.warning("the event tells no model version: %s", error)
        return {}
    if found is None or found.checkpoint.checkpoint != checkpoint:
        return {}
    return checkpoint_extra(found)
