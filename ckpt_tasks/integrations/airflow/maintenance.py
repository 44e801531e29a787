"""`maintenance_dag`: the maintenance of a whole store as a DAG. What it does is in
`ckpt_tasks.tasks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, Context, Param, chain
from airflow.sdk.exceptions import AirflowFailException

from ckpt_tasks.config import CheckpointConfig, RegistryConfig, RetentionConfig
from ckpt_tasks.errors import MaintenanceError
from ckpt_tasks.integrations.airflow.base import StoreStepOperator
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.dag_folder import dag_file

if TYPE_CHECKING:
    from ckpt_tasks.tasks import Maintenance

__all__ = [
    "CollectStoreOperator",
    "ExpireStoreOperator",
    "MaintenanceReportOperator",
    "ReconcileStoreOperator",
    "maintenance_dag",
]

_DRY_RUN = "dry_run"
_MAX_LINES = 500


class _MaintenanceOperator(StoreStepOperator):
    """Base of the steps: each takes what the one before has returned.

    Parameters
    ----------
    done
        What the step before has returned.
    retention
        Which checkpoints of each run are kept, and the grace. Default: the environment's
        (``CKPT_TASKS_RETENTION_...``), else all.
    """

    template_fields: Sequence[str] = (*StoreStepOperator.template_fields, "done")

    def __init__(
        self, *, done: Any = None, retention: RetentionConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.done = done
        self.retention = retention

    def _settings(self) -> Settings:
        return dataclasses.replace(super()._settings(), retention=self.retention)

    def _before(self) -> Maintenance:
        import msgspec

        from ckpt_tasks.tasks import Maintenance

        return msgspec.convert(self.done, Maintenance)

    def _told(self, done: Maintenance) -> dict[str, Any]:
        """The same as an XCom, and its total and troubles in the log."""
        import msgspec

        self.log.info("%s", done)
        for run in done.problems[:_MAX_LINES]:
            self.log.warning("run %r is left alone: %s", run.run, run.problem)
        result: dict[str, Any] = msgspec.to_builtins(done)
        return result


class ReconcileStoreOperator(_MaintenanceOperator):
    """Make the registry hold of each run what the store has.

    Parameters
    ----------
    runs
        Patterns of the names of the only runs that are maintained.
    **kwargs
        As for every operator of maintenance. The DAG's Param ``dry_run``, if there is one, says
        whether this step and those after it change anything.
    """

    def __init__(self, *, runs: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runs = list(runs)

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.params import check_conf

        check_conf(context)
        dry_run = bool(context["params"].get(_DRY_RUN, False))
        return self._told(
            tasks.reconcile_store(config, self.runs, dry_run=dry_run, tell=self.log.info)
        )


class ExpireStoreOperator(_MaintenanceOperator):
    """Mark what is no longer kept."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        from ckpt_tasks import tasks

        return self._told(tasks.expire_store(config, self._before()))


class CollectStoreOperator(_MaintenanceOperator):
    """Remove what has expired long enough ago, and what killed writes have left."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        from ckpt_tasks import tasks

        return self._told(tasks.collect_store(config, self._before()))


class MaintenanceReportOperator(_MaintenanceOperator):
    """Show what was done as a table in the log, and fail where a run was left alone."""

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks

        done = self._before()
        shown = [run for run in done.runs if run.changed or run.problem is not None]
        rows = tasks.maintenance_rows([done.total, *shown[:_MAX_LINES]])
        for line in tasks.markdown_table(rows).splitlines():
            self.log.info("%s", line)
        try:
            tasks.check_maintained(done)
        except MaintenanceError as error:
            # A retry would tell the same: what went wrong did so in the steps before.
            raise AirflowFailException(str(error)) from None
        total: dict[str, Any] = msgspec.to_builtins(done.total)
        return total


def maintenance_dag(
    *,
    dag_id: str = "maintain",
    store: str | None = None,
    ckpt_conn_id: str | None = None,
    retention: RetentionConfig | None = None,
    registry: RegistryConfig | None = None,
    mlflow_conn_id: str | None = None,
    runs: Sequence[str] = (),
    retries: int = 3,
    retry_delay: timedelta = timedelta(minutes=1),
    dag_schedule: Any = "@daily",
    **dag_arguments: Any,
) -> DAG:
    """Make a DAG that reconciles, expires and collects the runs of a store.

    The tasks: reconcile, expire, collect, report. A run of which something goes wrong is left
    alone, and the others are maintained all the same; ``report`` then fails. Whoever triggers the
    DAG may ask for a dry run, and nothing else.

    Parameters
    ----------
    store, ckpt_conn_id, registry, mlflow_conn_id
        As `StoreOperator` takes them.
    retention
        Which checkpoints of each run are kept, and the grace. Default: the environment's
        (``CKPT_TASKS_RETENTION_...``); else all are kept, and only what killed writes have left is
        collected.
    runs
        Patterns of the names of the only runs that are maintained: ``["nightly-*"]``.
    retries, retry_delay
        Of each task, where storage does not answer at all.
    dag_schedule
        The ``schedule`` of Airflow's ``DAG``.
    **dag_arguments
        For Airflow's ``DAG``.

    Raises
    ------
    ConfigError
        An argument cannot work.
    """
    how: dict[str, Any] = {
        "retries": retries,
        "retry_delay": retry_delay,
        "store": store,
        "ckpt_conn_id": ckpt_conn_id,
        "mlflow_conn_id": mlflow_conn_id,
        "registry": registry,
        "retention": retention,
    }
    dag_arguments.setdefault("doc_md", "Reconcile, expire and collect the runs of a store.")
    dag_arguments.setdefault("max_active_runs", 1)  # a second one would only look at it all again
    with DAG(dag_id, params={_DRY_RUN: _dry_run()}, schedule=dag_schedule, **dag_arguments) as dag:
        dag.fileloc = dag_file()
        reconcile = ReconcileStoreOperator(task_id="reconcile", runs=runs, **how)
        expire = ExpireStoreOperator(task_id="expire", done=reconcile.output, **how)
        collect = CollectStoreOperator(task_id="collect", done=expire.output, **how)
        report = MaintenanceReportOperator(task_id="report", done=collect.output, **how)
        chain(reconcile, expire, collect, report)
    return dag


def _dry_run() -> Param:
    description = "Change nothing; only tell what would be done."
    return Param(False, type="boolean", title=_DRY_RUN, description=description)
