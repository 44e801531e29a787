"""The digits classifier, once for each combination of hyperparameters; a table of the best.

Every combination is a training run of its own, which survives being killed like any other. Who
triggers the DAG may give another grid.
"""

import os

from ckpt_tasks import load_config
from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.integrations.airflow import resumable_sweep

sweep_digits = resumable_sweep(
    "ckpt_tasks.demo.digits:train",
    grid={"lr": [5e-4, 2e-3], "width": [16, 32], "epochs": [5]},
    metric="val_accuracy:max",
    dag_id="sweep-digits",
    registry=load_config().registry,
    schedule=ScheduleConfig(every_epochs=1, every=600),
    python=os.environ.get("CKPT_TASKS_DAGS_PYTHON"),
    at_once=2,
    tags=["ckpt-tasks"],
)
