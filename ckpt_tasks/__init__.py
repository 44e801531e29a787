"""Checkpoint and resume for PyTorch training under Prefect and Airflow, registered in MLflow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_tasks.config import CheckpointConfig, load_config
    from ckpt_tasks.training.data.samplers import ResumableDistributedSampler
    from ckpt_tasks.training.data.seeding import SeededDataset
    from ckpt_tasks.training.load import load_uri, open_uri
    from ckpt_tasks.training.run import TrainingRun

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "ResumableDistributedSampler",
    "SeededDataset",
    "TrainingRun",
    "__version__",
    "load_config",
    "load_uri",
    "open_uri",
]

_HOMES = {
    "CheckpointConfig": "ckpt_tasks.config",
    "ResumableDistributedSampler": "ckpt_tasks.training.data.samplers",
    "SeededDataset": "ckpt_tasks.training.data.seeding",
    "TrainingRun": "ckpt_tasks.training.run",
    "load_config": "ckpt_tasks.config",
    "load_uri": "ckpt_tasks.training.load",
    "open_uri": "ckpt_tasks.training.load",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: the package must be usable without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
