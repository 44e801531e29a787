from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.airflow_runs import (
    TESTS,
    Airflow,
    DagRun,
    kill,
    running_airflow,
    uninterrupted_digest,
    wait_for_step,
)
from support.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def airflow(
    tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer
) -> Iterator[Airflow]:
    """One real Airflow for all tests that need a scheduler: it takes a while to come up."""
    with running_airflow(tmp_path_factory.mktemp("airflow"), mlflow_server.uri) as started:
        yield started


@pytest.fixture(scope="session")
def whole_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the toy training's final state when nothing is killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_DIGEST", str(folder / "digest"))
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        return uninterrupted_digest(folder)


@pytest.fixture(scope="session")
def killed(airflow: Airflow, tmp_path_factory: pytest.TempPathFactory) -> DagRun:
    """A run of the whole DAG whose trainer was killed by SIGKILL, retried, at its end."""
    run = airflow.trigger(tmp_path_factory.mktemp("killed"), "toy")
    kill(wait_for_step(run.folder, 12))
    assert run.wait_for_state("success", "failed") == "success", run.told()
    return run
