"""`maintenance_flow`: the maintenance of a whole store as a Prefect flow."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from prefect import Flow, task
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.logging import get_run_logger

from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, RetentionConfig, StoreConfig
from ckpt_tasks.integrations.prefect.artifacts import artifact_key
from ckpt_tasks.integrations.prefect.blocks import CheckpointStore, ModelRegistry
from ckpt_tasks.integrations.prefect.configuration import Settings
from ckpt_tasks.integrations.prefect.tasks import PATIENT
from ckpt_tasks.tasks import Maintenance
from ckpt_tasks.tasks.credentials import environment

__all__ = ["maintenance_flow"]

_MAX_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class _Authored:
    """What the author of a deployment fixed, and whoever triggers it cannot change."""

    settings: Settings
    runs: Sequence[str]


def maintenance_flow(
    *,
    name: str = "maintain",
    store: str | StoreConfig | CheckpointStore | None = None,
    retention: RetentionConfig | None = None,
    registry: RegistryConfig | ModelRegistry | None = None,
    runs: Sequence[str] = (),
) -> Flow[..., dict[str, Any]]:
    """Make a flow that reconciles, expires and collects the runs of a store, to be scheduled.

    The steps, each a task: reconcile, expire, collect, report. A run of which something goes wrong
    is left alone, and the others are maintained all the same; the flow fails at its end. Who
    triggers it may ask for a dry run, and nothing else.

    What is not given here is the configuration's, as the flow finds it when it runs: see
    `resumable_flow`.

    Parameters
    ----------
    name
        The flow's name. Assign the flow to a module variable of this name, with underscores for
        anything that Python does not allow.
    store
        Configuration or a block; or a path or URL, which wins over ``store.url`` only.
    retention
        Which checkpoints of each run are kept, and the grace. Configured nowhere: all are kept,
        and only what killed writes have left is collected.
    registry
        Configuration or a block. Configured nowhere: nothing is reconciled.
    runs
        Patterns of the names of the only runs that are maintained: ``["nightly-*"]``.

    Raises
    ------
    ConfigError
        An argument cannot work.
    """
    settings = Settings(store=store, retention=retention, registry=registry)
    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    function = _flow_function(_Authored(settings=settings, runs=list(runs)), name, module)
    return Flow(function, name=name, persist_result=False)


def _flow_function(authored: _Authored, name: str, module: str) -> Callable[..., dict[str, Any]]:
    def maintain(dry_run: bool = False) -> dict[str, Any]:
        """Reconcile, expire and collect the runs of a store.

        Args:
            dry_run: Change nothing; only tell what would be done.
        """
        with environment(authored.settings.credentials()):
            return _execute(authored, name, dry_run)

    # Prefect finds a flow again by the module and the name of its function.
    maintain.__name__ = maintain.__qualname__ = re.sub(r"\W", "_", name)
    maintain.__module__ = module
    return maintain


def _execute(authored: _Authored, name: str, dry_run: bool) -> dict[str, Any]:
    config = authored.settings.resolve()
    done = reconcile_runs(config, authored.runs, dry_run)
    done = collect_runs(config, expire_runs(config, done))
    report_maintenance(name, done)
    tasks.check_maintained(done)
    total: dict[str, Any] = msgspec.to_builtins(done.total)
    return total


@task(name="reconcile", **PATIENT)
def reconcile_runs(config: CheckpointConfig, runs: Sequence[str], dry_run: bool) -> Maintenance:
    """Make the registry hold of each run what the store has."""
    logger = get_run_logger()
    return _told(tasks.reconcile_store(config, runs, dry_run=dry_run, tell=logger.info))


@task(name="expire", **PATIENT)
def expire_runs(config: CheckpointConfig, done: Maintenance) -> Maintenance:
    """Mark what is no longer kept."""
    return _told(tasks.expire_store(config, done))


@task(name="collect", **PATIENT)
def collect_runs(config: CheckpointConfig, done: Maintenance) -> Maintenance:
    """Remove what has expired long enough ago, and what killed writes have left."""
    return _told(tasks.collect_store(config, done))


@task(name="report", **PATIENT)
def report_maintenance(name: str, done: Maintenance) -> None:
    """Publish a table of what was done, and an event with the total."""
    shown = [run for run in done.runs if run.changed or run.problem is not None]
    create_table_artifact(
        table=tasks.maintenance_rows([done.total, *shown[:_MAX_ROWS]]),
        key=artifact_key("maintenance", name),
        description=f"{done}. Store `{done.store}`; runs without a change are not shown",
    )
    resource = f"ckpt_tasks.store.{done.store}"
    emit_event(
        event="ckpt_tasks.store.maintained",
        resource={"prefect.resource.id": resource, "prefect.resource.name": done.store},
        payload={
            **msgspec.to_builtins(done.total),
            "dry_run": done.dry_run,
            "problems": {run.run: run.problem for run in done.problems[:_MAX_ROWS]},
        },
    )


def _told(done: Maintenance) -> Maintenance:
    logger = get_run_logger()
    logger.info("%s", done)
    for run in done.problems[:_MAX_ROWS]:
        logger.warning("run %r is left alone: %s", run.run, run.problem)
    return done
