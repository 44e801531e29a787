"""A Prefect server for the tests of this folder, some of which run Prefect in pytest's process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.prefect_server import PrefectServer

# In a forked process Prefect's own exit calls fail (3.7.7: `_QueueServiceBase._drain` asserts an
# event that its reset after the fork has taken away), which would end the `DataLoader` workers of
# later tests with status 1.
os.register_at_fork(after_in_child=threading._threading_atexits.clear)


@pytest.fixture(scope="session")
def prefect_api(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """The server, with this process's Prefect client pointed at it."""
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url}):
        yield prefect_server


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied: making them takes many seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
