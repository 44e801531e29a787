"""Buttons of a training task in Airflow's UI that lead to pages about its run.

The task writes the addresses as XComs while it runs, so they are there before it ends, and stay
when its process is killed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
from airflow.sdk import BaseOperatorLink

__all__ = ["DashboardLink", "MlflowModelVersionLink", "MlflowRunLink", "PageLink"]


@attrs.define()
class PageLink(BaseOperatorLink):
    """A page about the run; `page` is what kind: ``run`` and ``version`` are the registry's."""

    page: ClassVar[str]

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The address; called in the task's own process when the task has ended."""
        return str(operator.page_links.get(self.page, ""))


@attrs.define()
class MlflowRunLink(PageLink):
    """The training run's page."""

    name = "MLflow run"
    page = "run"


@attrs.define()
class MlflowModelVersionLink(PageLink):
    """The page of the newest registered checkpoint's model version."""

    name = "MLflow model version"
    page = "version"


@attrs.define()
class DashboardLink(PageLink):
    """The run's page on the dashboard that ``dashboard.url`` names."""

    name = "Dashboard"
    page = "dashboard"
