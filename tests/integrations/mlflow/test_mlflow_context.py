"""Runs that users start inside a flow or DAG run carry its ids."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ckpt_tasks.integrations.mlflow.context import OrchestratorContext

USERS_CODE = """
import mlflow
mlflow.set_tracking_uri({uri!r})
with mlflow.start_run() as run:
    print(run.info.run_id)
"""


def test_declared_as_an_entry_point() -> None:
    """MLflow finds the provider through its own group of entry points."""
    (found,) = entry_points(group="mlflow.run_context_provider", name="ckpt-tasks")
    assert found.load() is OrchestratorContext


@pytest.mark.parametrize(
    ("variables", "tags"),
    [
        ({"PREFECT__FLOW_RUN_ID": "f-1"}, {"prefect.flow_run_id": "f-1"}),
        (
            {
                "AIRFLOW_CTX_DAG_ID": "train",
                "AIRFLOW_CTX_DAG_RUN_ID": "manual__1",
                "AIRFLOW_CTX_TASK_ID": "fit",
            },
            {
                "airflow.dag_id": "train",
                "airflow.dag_run_id": "manual__1",
                "airflow.task_id": "fit",
            },
        ),
    ],
)
def test_tags_of_the_orchestrator(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], tags: dict[str, str]
) -> None:
    """The ids in the environment become tags; outside an orchestrator there are none."""
    context = OrchestratorContext()
    assert not context.in_context()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert context.in_context()
    assert context.tags() == tags


def test_users_own_run_is_tagged(
    tmp_path: Path, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mlflow.start_run`` in a flow run's process tags the run, without a warning at import."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "f-2")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", USERS_CODE.format(uri=sqlite_uri)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = MlflowClient(sqlite_uri).get_run(done.stdout.split()[0])
    assert run.data.tags["prefect.flow_run_id"] == "f-2"
