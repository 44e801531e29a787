"""Airflow: operators, hooks and a DAG factory for training runs that survive being killed.

Names are loaded on first use, so that a DAG file is parsed quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tasks.integrations.airflow.assets import run_asset
    from ckpt_tasks.integrations.airflow.dag import resumable_dag
    from ckpt_tasks.integrations.airflow.decorators import resumable_training_task
    from ckpt_tasks.integrations.airflow.hooks import CheckpointHook, MlflowHook
    from ckpt_tasks.integrations.airflow.maintenance import (
        CollectStoreOperator,
        ExpireStoreOperator,
        MaintenanceReportOperator,
        ReconcileStoreOperator,
        maintenance_dag,
    )
    from ckpt_tasks.integrations.airflow.operators import (
        PromoteOperator,
        RecoverOperator,
        ReportOperator,
        ResolveOperator,
        TrainOperator,
        VerifyOperator,
    )
    from ckpt_tasks.integrations.airflow.retain import RetainOperator
    from ckpt_tasks.integrations.airflow.sensors import CheckpointSensor
    from ckpt_tasks.integrations.airflow.sweep import PlanOperator, RankOperator, resumable_sweep

__all__ = [
    "CheckpointHook",
    "CheckpointSensor",
    "CollectStoreOperator",
    "ExpireStoreOperator",
    "MaintenanceReportOperator",
    "MlflowHook",
    "PlanOperator",
    "PromoteOperator",
    "RankOperator",
    "ReconcileStoreOperator",
    "RecoverOperator",
    "ReportOperator",
    "ResolveOperator",
    "RetainOperator",
    "TrainOperator",
    "VerifyOperator",
    "maintenance_dag",
    "resumable_dag",
    "resumable_sweep",
    "resumable_training_task",
    "run_asset",
]

_MODULES = {
    "CheckpointHook": "hooks",
    "CheckpointSensor": "sensors",
    "CollectStoreOperator": "maintenance",
    "ExpireStoreOperator": "maintenance",
    "MaintenanceReportOperator": "maintenance",
    "MlflowHook": "hooks",
    "PlanOperator": "sweep",
    "RankOperator": "sweep",
    "ReconcileStoreOperator": "maintenance",
    "RetainOperator": "retain",
    "maintenance_dag": "maintenance",
    "resumable_dag": "dag",
    "resumable_sweep": "sweep",
    "resumable_training_task": "decorators",
    "run_asset": "assets",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'operators')}"), name)
