"""Retention as a step of a DAG. What it does is in `ckpt_tasks.tasks`."""

from __future__ import annotations

import dataclasses
from typing import Any

from airflow.sdk import Context

from ckpt_tasks.config import CheckpointConfig, RetentionConfig
from ckpt_tasks.integrations.airflow.base import StepOperator
from ckpt_tasks.integrations.airflow.configuration import Settings

__all__ = ["RetainOperator"]


class RetainOperator(StepOperator):
    """Mark the checkpoints that are no longer kept, and remove what was marked long enough ago.

    Parameters
    ----------
    retention
        Which are kept. Default: the environment's (``CKPT_TASKS_RETENTION_...``), else all.
    """

    def __init__(self, *, retention: RetentionConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.retention = retention

    def _settings(self) -> Settings:
        return dataclasses.replace(super()._settings(), retention=self.retention)

    def _execute(self, context: Context, config: CheckpointConfig) -> dict[str, Any]:
        import msgspec

        from ckpt_tasks import tasks

        report = tasks.retain(config, self.run_name)
        self.log.info("%s", report)
        result: dict[str, Any] = msgspec.to_builtins(report)
        return result
