"""What Airflow's provider discovery reads: connection types, links and the decorator.

Found through the entry point ``apache_airflow_provider``. The keys are those of Airflow's
``provider_info.schema.json``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

__all__ = ["get_provider_info"]

_PACKAGE = "ckpt_tasks.integrations.airflow"


def get_provider_info() -> dict[str, Any]:
    """Describe this package to Airflow."""
    return {
        "package-name": "ckpt-tasks",
        "name": "ckpt_tasks",
        "description": "PyTorch training that resumes from its last registered checkpoint.",
        "versions": [version("ckpt-tasks")],
        "connection-types": [
            {
                "connection-type": "ckpt_tasks",
                "hook-class-name": f"{_PACKAGE}.hooks.CheckpointHook",
                "hook-name": "Checkpoint store",
            },
            {
                "connection-type": "mlflow",
                "hook-class-name": f"{_PACKAGE}.hooks.MlflowHook",
                "hook-name": "MLflow",
            },
        ],
        "extra-links": [
            f"{_PACKAGE}.links.MlflowRunLink",
            f"{_PACKAGE}.links.MlflowModelVersionLink",
        ],
        "task-decorators": [
            {
                "name": "resumable_training",
                "class-name": f"{_PACKAGE}.decorators.resumable_training_task",
            }
        ],
    }
