"""What an asset's event says of a checkpoint, so that other DAGs are scheduled by a new model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from airflow.sdk import Asset, AssetAlias, BaseOperator, Context

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.format.layout import encode_name
from ckpt_tasks.registry import Registration

__all__ = ["ask_registry", "checkpoint_extra", "names_of", "run_asset", "tell_outlets"]


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
    if found.registration is not None:
        extra.update(names_of(found.registration))
    return extra


def names_of(registration: Registration) -> dict[str, str]:
    """What the registry calls a checkpoint, under the names that events have for it."""
    return {
        "mlflow_run_id": registration.run_id,
        "model_id": registration.model_id,
        "registered_model": registration.registered_model,
        "version": registration.version,
    }


def ask_registry(
    operator: BaseOperator, config: CheckpointConfig, run: str, checkpoint: str
) -> tasks.FoundCheckpoint | None:
    """What the registry knows of a checkpoint; ``None`` where there is none or it does not answer.

    A registry that is away delays no event: the checkpoint is there all the same.
    """
    if config.registry.tracking_uri is None:
        return None
    try:
        found = tasks.find(config, tasks.parse_wanted(run))
    except RegistryError as error:
        operator.log.warning("no model version is told: %s", error)
        return None
    return found if found is not None and found.checkpoint.checkpoint == checkpoint else None


def tell_outlets(
    operator: BaseOperator,
    context: Context,
    config: CheckpointConfig,
    run: str,
    checkpoint: str,
    registered: Mapping[str, str] | None = None,
) -> None:
    """Say in the events of the task's outlets which checkpoint they are about.

    An outlet that is an alias gets the event of the run's own asset.

    Parameters
    ----------
    registered
        What the registry calls it, as `names_of` tells; ``None``: it is asked.
    """
    if not operator.outlets:
        return
    if registered is None:
        found = ask_registry(operator, config, run, checkpoint)
        registered = names_of(found.registration) if found and found.registration else {}
    located = tasks.locate(config.store, run, checkpoint)
    extra: dict[str, Any] = {**msgspec.to_builtins(located), **registered}
    for outlet in operator.outlets:
        event = context["outlet_events"][outlet]
        if isinstance(outlet, AssetAlias):
            event.add(run_asset(run), extra)
        else:
            event.extra = extra
