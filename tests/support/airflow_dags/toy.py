"""The toy training as DAGs: one that works, and those that no retry mends.

A DAG run's conf may hold ``environment``: variables for its tasks, ``TOY_STEP_SECONDS`` say.
Store and MLflow come from the environment of the whole Airflow, as teams configure them.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from ckpt_tasks.config import AttemptConfig, ScheduleConfig, load_config
from ckpt_tasks.integrations.airflow import TrainOperator, resumable_dag


def set_environment(context: Any) -> None:
    """Give a task, and what it starts, the variables of its DAG run."""
    os.environ.update((context["dag_run"].conf or {}).get("environment", {}))


RETRYING: dict[str, Any] = {"retries": 2, "retry_delay": timedelta(seconds=1)}
HOW: dict[str, Any] = {
    "registry": load_config().registry,
    "schedule": ScheduleConfig(every_steps=3),
    "attempt": AttemptConfig(heartbeat=1.0, takeover_after=5.0, grace=10.0, without_commit=3),
    **RETRYING,
}

toy = resumable_dag(
    "support.toy_training:train",
    dag_id="toy",
    default_args={"pre_execute": set_environment},
    **HOW,
)

# The same training run in every DAG run, whichever orchestrator has begun it.
shared = resumable_dag(
    "support.toy_training:train",
    dag_id="shared",
    run_name="{{ dag_run.conf['run_name'] }}",
    default_args={"pre_execute": set_environment},
    **HOW,
)

with DAG("wrong", schedule=None, default_args=RETRYING):
    TrainOperator(task_id="entrypoint", entrypoint="support.toy_training:trian")
    TrainOperator(
        task_id="connection", entrypoint="support.toy_training:train", ckpt_conn_id="nowhere"
    )
    TrainOperator(
        task_id="param", entrypoint="support.toy_training:train", params={"learning_rate": 0.1}
    )
    TrainOperator(task_id="state", entrypoint="support.toy_training:untrackable")
