"""The digits classifier as an Airflow DAG that survives being killed.

Copy it for a training function of your own. Store and registry come from
``CKPT_TASKS_STORE_URL``, ``CKPT_TASKS_REGISTRY_TRACKING_URI`` and their like, in the environment
of the worker; or from Airflow connections: ``ckpt_conn_id``, ``mlflow_conn_id``. Where Airflow's
own environment has no torch, ``CKPT_TASKS_DAGS_PYTHON`` names the interpreter that trains.
"""

import os

from ckpt_tasks import load_config
from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.integrations.airflow import resumable_dag

train_digits = resumable_dag(
    "ckpt_tasks.demo.digits:train",
    dag_id="train-digits",
    registry=load_config().registry,
    schedule=ScheduleConfig(every_epochs=1, every=600),
    python=os.environ.get("CKPT_TASKS_DAGS_PYTHON"),
    retries=3,
    tags=["ckpt-tasks"],
)
