"""The toy training as DAGs: one that works, and those that no retry mends.

A DAG run's conf may hold ``environment``: variables for its tasks, ``TOY_STEP_SECONDS`` say.
Store and MLflow come from the environment of the whole Airflow, as teams configure them.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param, task

from ckpt_tasks.config import AttemptConfig, ScheduleConfig, load_config
from ckpt_tasks.integrations.airflow import (
    CheckpointSensor,
    TrainOperator,
    resumable_dag,
    run_asset,
)

ENTRYPOINT = "support.toy_training:train"


def set_environment(context: Any) -> None:
    """Give a task, and what it starts, the variables of its DAG run."""
    os.environ.update((context["dag_run"].conf or {}).get("environment", {}))


DEFAULTS: dict[str, Any] = {
    "retries": 2,
    "retry_delay": timedelta(seconds=1),
    "pre_execute": set_environment,
}
HOW: dict[str, Any] = {
    "registry": load_config().registry,
    "schedule": ScheduleConfig(every_steps=3),
    "attempt": AttemptConfig(heartbeat=1.0, takeover_after=5.0, grace=10.0, without_commit=3),
}

# Every step as a task.
toy = resumable_dag(
    ENTRYPOINT,
    dag_id="toy",
    default_args=DEFAULTS,
    retries=2,
    retry_delay=timedelta(seconds=1),
    **HOW,
)

toy.params["environment"] = Param({}, type="object")

# Runs by itself whenever the DAG above has a new model.
with DAG("follow", schedule=[run_asset("toy")]):

    @task
    def told(triggering_asset_events: Any = None) -> list[dict[str, Any]]:
        """What the events say of the checkpoint."""
        return [event.extra for event in triggering_asset_events[run_asset("toy")]]

    told()

# Training alone. A run's name in the conf makes it the same training run in every DAG run.
with DAG("quick", schedule=None, default_args=DEFAULTS, params={"resume": "auto"}):
    TrainOperator(
        task_id="train",
        entrypoint=ENTRYPOINT,
        run_name="{{ dag_run.conf.get('run_name', dag.dag_id ~ '-' ~ run_id) }}",
        resume="{{ params.resume }}",
        outlets=[run_asset("quick")],
        **HOW,
    )

# Waits for a checkpoint of the run that its conf names.
with DAG("wait", schedule=None, params={"run_name": Param("", type="string")}):
    CheckpointSensor(
        task_id="wait",
        run_name="{{ params.run_name }}",
        newer_than=8,
        better_than="loss:min:100",
        registry=HOW["registry"],
        deferrable=True,
        poke_interval=1,
    )

# A field of the form for each kind of hyperparameter; never run.
resumable_dag("support.many_kinds:train", dag_id="form", store="unused")

# Each fails at its own mistake.
with DAG("wrong", schedule=None, default_args=DEFAULTS):
    TrainOperator(task_id="entrypoint", entrypoint="support.toy_training:trian")
    TrainOperator(task_id="connection", entrypoint=ENTRYPOINT, ckpt_conn_id="nowhere")
    TrainOperator(task_id="param", entrypoint=ENTRYPOINT, params={"learning_rate": 0.1})
    TrainOperator(task_id="state", entrypoint="support.toy_training:untrackable")
