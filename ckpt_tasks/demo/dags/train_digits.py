"""The demo's DAG: what a team would write, and nothing else.

Store and MLflow come from ``CKPT_TASKS_STORE_URL`` and its like, in the environment of Airflow.
"""

from __future__ import annotations

from datetime import timedelta

from ckpt_tasks.config import ScheduleConfig, load_config
from ckpt_tasks.integrations.airflow import resumable_dag

train_digits = resumable_dag(
    "ckpt_tasks.demo.digits:train",
    dag_id="train-digits",
    run_name="digits",
    registry=load_config().registry,
    schedule=ScheduleConfig(every_steps=20, every_epochs=1),
    retries=5,
    retry_delay=timedelta(seconds=1),
)
