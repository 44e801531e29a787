from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_mlflow_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    """No settings of the machine's, and a working directory where stray files are noticed."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that registries open without a server; made when first used."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow-sqlite')}/mlflow.db"
