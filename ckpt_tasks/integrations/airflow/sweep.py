"""`resumable_sweep`: one resumable training run for each combination of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Context, Param

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    SaveConfig,
    ScheduleConfig,
)
from ckpt_tasks.integrations.airflow.base import StepOperator
from ckpt_tasks.integrations.airflow.dag_folder import (
    code_folders,
    dag_file,
    signature_at_parse,
)
from ckpt_tasks.integrations.airflow.operators import TrainOperator

__all__ = ["PlanOperator", "RankOperator", "resumable_sweep"]

_RUN_NAME = "{{ dag.dag_id }}-{{ run_id }}"
_LABEL = "{{ ti.xcom_pull(task_ids='plan')[ti.map_index]['params'] }}"
_GRID = {"type": "array", "minItems": 1}


class PlanOperator(StepOperator):
    """Name a training run for each combination of the grid, all of them checked.

    It returns a list of ``{"run_name": ..., "params": {...}}`` to expand `TrainOperator` with.

    Parameters
    ----------
    entrypoint, python
        As `TrainOperator` takes them.
    grid
        Values by hyperparameter, or a template of them.
    **kwargs
        As for every operator here; `run_name` is what the runs' names begin with.
    """

    template_fields: Sequence[str] = (*StepOperator.template_fields, "entrypoint", "python")

    def __init__(
        self,
        *,
        entrypoint: str,
        grid: Mapping[str, Sequence[Any]] | None = None,
        python: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.entrypoint = entrypoint
        self.grid = grid
        self.python = python

    def _execute(self, context: Context, config: CheckpointConfig) -> list[dict[str, Any]]:
        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.params import check_conf

        check_conf(context)
        folders = code_folders(context["dag"], context)
        signature = tasks.signature_of_entrypoint(self.entrypoint, self.python, folders)
        grid = self.grid if self.grid is not None else context["params"]["grid"]
        planned = tasks.combinations(signature, grid)
        self.log.info("%s training runs: %s", len(planned), self.run_name)
        return [
            {"run_name": f"{self.run_name}-{number}", "params": params}
            for number, params in enumerate(planned)
        ]


class RankOperator(StepOperator):
    """Say which of the planned runs is best, as a table in the log and as an XCom.

    Parameters
    ----------
    planned
        What `PlanOperator` returned.
    metric
        ``METRIC:min`` or ``METRIC:max``.
    """

    template_fields: Sequence[str] = (*StepOperator.template_fields, "planned", "metric")

    def __init__(self, *, planned: Any, metric: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.planned = planned
        self.metric = metric

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks

        trials = [tasks.Trial(run=each["run_name"], params=each["params"]) for each in self.planned]
        ranking = tasks.rank(config.store, trials, self.metric)
        for line in ranking.markdown.splitlines():
            self.log.info("%s", line)
        result: dict[str, Any] = msgspec.to_builtins(ranking)
        result["best"] = msgspec.to_builtins(ranking.best)
        return result


def resumable_sweep(
    entrypoint: str,
    *,
    grid: Mapping[str, Sequence[Any]],
    metric: str,
    dag_id: str | None = None,
    store: str | None = None,
    ckpt_conn_id: str | None = None,
    schedule: ScheduleConfig | None = None,
    save: SaveConfig | None = None,
    retention: RetentionConfig | None = None,
    registry: RegistryConfig | None = None,
    mlflow_conn_id: str | None = None,
    attempt: AttemptConfig | None = None,
    nproc: int | None = None,
    python: str | None = None,
    retries: int = 3,
    retry_delay: timedelta = timedelta(seconds=30),
    at_once: int = 4,
    **dag_arguments: Any,
) -> DAG:
    """Make a DAG that trains each combination of the grid, resumably, and ranks the runs.

    Parameters
    ----------
    entrypoint, store, ckpt_conn_id, schedule, save, retention, registry, mlflow_conn_id, attempt, \
nproc, python, retries, retry_delay
        As `resumable_dag` takes them.
    grid
        Values by hyperparameter; whoever triggers the DAG may give others.
    metric
        What the runs are ranked by: ``METRIC:min`` or ``METRIC:max``.
    dag_id
        Default: ``sweep-`` and the function's name.
    at_once
        How many of the runs train at the same time, each on its `nproc` ranks.
    **dag_arguments
        For Airflow's ``DAG``.

    Raises
    ------
    ConfigError
        There is no such function, or the grid does not fit it.
    """
    from ckpt_tasks.tasks.sweep import combinations

    file = dag_file()
    signature = signature_at_parse(entrypoint, python, file)
    combinations(signature, grid)
    run: dict[str, Any] = {
        "retries": retries,
        "retry_delay": retry_delay,
        "store": store,
        "ckpt_conn_id": ckpt_conn_id,
        "mlflow_conn_id": mlflow_conn_id,
        "registry": registry,
    }
    name = dag_id or f"sweep-{signature.function.replace('_', '-')}"
    dag_arguments.setdefault("schedule", None)
    with DAG(name, params={"grid": _grid_param(grid)}, **dag_arguments) as dag:
        dag.fileloc = file
        plan = PlanOperator(
            task_id="plan", entrypoint=entrypoint, python=python, run_name=_RUN_NAME, **run
        )
        train = TrainOperator.partial(
            task_id="train",
            entrypoint=entrypoint,
            schedule=schedule,
            save=save,
            retention=retention,
            attempt=attempt,
            nproc=nproc,
            python=python,
            max_active_tis_per_dagrun=at_once,
            map_index_template=_LABEL,
            **run,
        ).expand_kwargs(plan.output)
        ranking = RankOperator(
            task_id="best",
            planned=plan.output,
            metric=metric,
            run_name=_RUN_NAME,
            **run,
        )
        plan >> train >> ranking
        # As a teardown: it ranks what was trained, and does not make a success of the rest.
        ranking.as_teardown(setups=plan)
    return dag


def _grid_param(grid: Mapping[str, Sequence[Any]]) -> Param:
    """The grid as a field of the form that triggers the DAG."""
    return Param(
        {name: list(values) for name, values in grid.items()},
        type="object",
        title="grid",
        description="Values by hyperparameter; each combination is a training run.",
        additionalProperties=_GRID,
        minProperties=1,
    )
