"""What Airflow's provider discovery reads: connection types, links and the decorator.

Found through the entry point ``apache_airflow_provider``. The keys are those of Airflow's
``provider_info.schema.json``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

__all__ = ["get_provider_info"]

_PACKAGE = "ckpt_tasks.integrations.airflow"


_STORE = {
    "connection-type": "ckpt_tasks",
    "hook-class-name": f"{_PACKAGE}.hooks.CheckpointHook",
    "hook-name": "Checkpoint store",
    "ui-field-behaviour": {
        "hidden-fields": ["schema", "login", "password", "port"],
        "relabeling": {"host": "Root of the store"},
        "placeholders": {"host": "s3://bucket/checkpoints"},
    },
    "conn-fields": {
        "storage_conn_id": {
            "label": "Connection of the storage",
            "description": "Amazon or Google connection that has the credentials: aws_default",
            "schema": {"type": ["string", "null"]},
        },
        "single_writer": {
            "label": "Single writer",
            "description": "No two attempts can ever write at once; for storage without a "
            "conditional create",
            "schema": {"type": ["boolean", "null"]},
        },
    },
}
_MLFLOW = {
    "connection-type": "mlflow",
    "hook-class-name": f"{_PACKAGE}.hooks.MlflowHook",
    "hook-name": "MLflow",
    "ui-field-behaviour": {
        "hidden-fields": ["schema"],
        "relabeling": {"host": "Tracking URI"},
        "placeholders": {"host": "https://mlflow.example.org"},
    },
    "conn-fields": {
        "token": {"label": "Token", "schema": {"type": ["string", "null"], "format": "password"}},
        "insecure_tls": {
            "label": "Accept any TLS certificate",
            "schema": {"type": ["boolean", "null"]},
        },
    },
}


def get_provider_info() -> dict[str, Any]:
    """Describe this package to Airflow."""
    return {
        "package-name": "ckpt-tasks",
        "name": "ckpt_tasks",
        "description": "PyTorch training that resumes from its last registered checkpoint.",
        "versions": [version("ckpt-tasks")],
        "connection-types": [_STORE, _MLFLOW],
        "extra-links": [
            f"{_PACKAGE}.links.MlflowRunLink",
            f"{_PACKAGE}.links.MlflowModelVersionLink",
            f"{_PACKAGE}.links.DashboardLink",
        ],
        "task-decorators": [
            {
                "name": "resumable_training",
                "class-name": f"{_PACKAGE}.decorators.resumable_training_task",
            }
        ],
    }
