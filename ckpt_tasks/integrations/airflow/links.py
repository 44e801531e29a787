"""Buttons of a training task in Airflow's UI that lead to MLflow.

The task writes the addresses as XComs while it runs, so they are there before it ends, and stay
when its process is killed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
from airflow.sdk import BaseOperatorLink

__all__ = ["MlflowModelVersionLink", "MlflowRunLink", "RegistryLink"]


@attrs.define()
class RegistryLink(BaseOperatorLink):
    """A page of the registry; `page` is the registry's name for this kind of page."""

    page: ClassVar[str]

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The address; called in the task's own process when the task has ended."""
        return str(operator.registry_links.get(self.page, ""))


@attrs.define()
class MlflowRunLink(RegistryLink):
    """The training run's page."""

    name = "MLflow run"
    page = "run"


@attrs.define()
class MlflowModelVersionLink(RegistryLink):
    """The page of the newest registered checkpoint's model version."""

    name = "MLflow model version"
    page = "version"
