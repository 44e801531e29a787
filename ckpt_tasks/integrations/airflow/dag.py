"""`resumable_dag`: a training function as an Airflow DAG that survives being killed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, chain

from ckpt_tasks.config import (
    AttemptConfig,
    RegistryConfig,
    RetentionConfig,
    SaveConfig,
    ScheduleConfig,
)
from ckpt_tasks.integrations.airflow.assets import run_asset
from ckpt_tasks.integrations.airflow.dag_folder import dag_file, signature_at_parse
from ckpt_tasks.integrations.airflow.operators import (
    PromoteOperator,
    RecoverOperator,
    ReportOperator,
    ResolveOperator,
    TrainOperator,
    VerifyOperator,
)
from ckpt_tasks.integrations.airflow.params import form_params
from ckpt_tasks.integrations.airflow.retain import RetainOperator
from ckpt_tasks.tasks.form import RESUME

__all__ = ["resumable_dag"]

_RUN_NAME = "{{ dag.dag_id }}-{{ run_id }}"


def resumable_dag(
    entrypoint: str,
    *,
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
    run_name: str = _RUN_NAME,
    python: str | None = None,
    retries: int = 3,
    retry_delay: timedelta = timedelta(seconds=30),
    alias: str | None = "verified",
    dag_schedule: Any = None,
    **dag_arguments: Any,
) -> DAG:
    """Make a DAG whose Params are the training function's own hyperparameters.

    The tasks: resolve, recover (reports what training would start from), train (with retries),
    verify, promote (with a registry), retain (with `retention`), report. The asset `run_asset` of
    the DAG's id is updated when a checkpoint has been verified and promoted.

    Parameters
    ----------
    entrypoint
        ``package.module:train`` or ``path/to/file.py:train``, its source readable where DAGs are
        parsed; it is not imported there. Files and modules beside the DAG file are found.
    dag_id
        Default: the function's name.
    store, ckpt_conn_id, registry, mlflow_conn_id, schedule, save, retention, attempt, nproc, python
        As `TrainOperator` takes them.
    run_name
        Name of the training run, a template. A name without ``run_id`` goes on with the same
        training run in later DAG runs, of which only one is active at a time.
    retries, retry_delay
        Of each task, for outcomes worth retrying.
    alias
        Alias that is set on the newest checkpoint once it is verified; ``None``: no such task.
    dag_schedule
        The ``schedule`` of Airflow's ``DAG``: when it runs by itself. Every hyperparameter then
        needs a default.
    **dag_arguments
        For Airflow's ``DAG``.

    Raises
    ------
    ConfigError
        There is no such function, or an argument cannot work.
    """
    file = dag_file()
    signature = signature_at_parse(entrypoint, python, file)
    name = dag_id or signature.function.replace("_", "-")
    dag_arguments.setdefault("doc_md", signature.summary or f"Train {entrypoint}, resumably.")
    if "run_id" not in run_name:
        # Two at once would find the training run busy.
        dag_arguments.setdefault("max_active_runs", 1)
    run: dict[str, Any] = {
        "retries": retries,
        "retry_delay": retry_delay,
        "run_name": run_name,
        "store": store,
        "ckpt_conn_id": ckpt_conn_id,
        "mlflow_conn_id": mlflow_conn_id,
        "registry": registry,
    }
    training: dict[str, Any] = {
        **run,
        "entrypoint": entrypoint,
        "schedule": schedule,
        "save": save,
        "retention": retention,
        "attempt": attempt,
        "nproc": nproc,
        "python": python,
        "resume": f"{{{{ params.{RESUME} }}}}",
    }
    with DAG(
        name,
        params=form_params(signature),
        schedule=dag_schedule,
        **dag_arguments,
    ) as dag:
        dag.fileloc = file
        resolve = ResolveOperator(task_id="resolve", **training)
        recover = RecoverOperator(task_id="recover", **training)
        train = TrainOperator(task_id="train", **training)
        verify = VerifyOperator(task_id="verify", **run)
        steps: list[Any] = [resolve, recover, train, verify]
        if alias is not None and (mlflow_conn_id or (registry and registry.tracking_uri)):
            newest = f"{{{{ ti.xcom_pull(task_ids='{verify.task_id}')['checkpoint'] }}}}"
            steps.append(PromoteOperator(task_id="promote", checkpoint=newest, alias=alias, **run))
        steps[-1].add_outlets([run_asset(name)])
        if retention is not None and not retention.keeps_everything:
            steps.append(RetainOperator(task_id="retain", retention=retention, **run))
        report = ReportOperator(task_id="report", **run)
        chain(*steps, report)
        # As a teardown: it reports a failure too, and does not make a success of it.
        report.as_teardown(setups=resolve)
    return dag
