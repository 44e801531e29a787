"""MLflow: one run per training run, one logged model and registered version per checkpoint.

`MlflowRegistry` is loaded on first use. MLflow imports this package for its run-context
provider while MLflow itself is still being imported, so nothing here may import MLflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tasks.integrations.mlflow.registry import MlflowRegistry

__all__ = ["MlflowRegistry"]


def __getattr__(name: str) -> Any:
    if name == "MlflowRegistry":
        from ckpt_tasks.integrations.mlflow.registry import MlflowRegistry

        return MlflowRegistry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
