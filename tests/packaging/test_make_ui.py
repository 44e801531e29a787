"""``make ui``: MLflow's pages on what the demo has made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from support.prefect_server import ProcessGroup, free_port, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Of this environment, on a demo's folder of its own."""
    if not Path(sys.prefix, ".installed").exists():
        pytest.skip("this environment was not made by `make install`, which `make ui` calls first")
    return ["make", "ui", f"VENV={sys.prefix}", f"DEMO_FOLDER={tmp_path}/demo"]


def test_without_a_demo_it_says_how_to_make_one(command: list[str]) -> None:
    """There is nothing to show yet: one line, and no server."""
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "mlflow.db yet: make demo" in answer.stderr


def test_it_serves_the_demos_database(command: list[str], tmp_path: Path) -> None:
    """A run that stands in the database is answered by the server."""
    database = tmp_path / "demo" / "mlflow.db"
    database.parent.mkdir()
    MlflowClient(f"sqlite:///{database}").create_experiment("digits")
    port = free_port()
    log = tmp_path / "log"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [*command, f"UI_PORT={port}"]
    with ProcessGroup(command, env=environment, cwd=REPOSITORY, log=log) as server:
        wait_until(lambda: _healthy(port) or server.process.poll(), timeout=120, what="pages")
        assert server.process.poll() is None, server.output()
        found = requests.get(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": "digits"},
            timeout=30,
        )
        assert found.json()["experiment"]["name"] == "digits"


def _healthy(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.ConnectionError:
        return False
