"""Attempts of the toy training, and the training that nothing ever happened to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.attempt_forks import AttemptForks
from support.small_disk import SmallDisk, small_disk
from support.toy_runs import Digest, toy_spec

from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttemptForks]:
    """Forks a child per attempt."""
    with AttemptForks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def root() -> Iterator[Path]:
    """A store's root, in memory where the system has such a folder.

    SIGKILL keeps the page cache, so nothing here depends on the disk, and hundreds of attempts
    would wait for it.
    """
    memory = "/dev/shm"  # noqa: S108 - a private folder is made in it
    with tempfile.TemporaryDirectory(
        prefix="ckpt-tasks-test-", dir=memory if os.access(memory, os.W_OK) else None
    ) as folder:
        yield Path(folder) / "store"


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training in a store of its own."""
    return toy_spec(root)


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_database(
    _migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """URI of an empty MLflow database of this test's own, and no settings of the machine's."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    shutil.copy(_migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def digest(tmp_path: Path) -> Digest:
    """Where this test's training writes its digest."""
    return Digest(tmp_path / "digest")


@pytest.fixture(scope="session")
def expected_digest(forks: AttemptForks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the training that was never killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    digest = Digest(folder / "digest")
    fork = forks.run(toy_spec(folder / "store"), environment=digest.environment)
    assert fork.outcome.code == EXIT_DONE, fork.output
    return digest.read()


@pytest.fixture
def finish(
    forks: AttemptForks, digest: Digest, expected_digest: str
) -> Callable[[TrainSpec], None]:
    """Resume a run without faults, as an orchestrator's retry does, and compare its end."""

    def finish_run(spec: TrainSpec) -> None:
        fork = forks.run(spec, environment=digest.environment)
        assert fork.outcome.code == EXIT_DONE, fork.output
        assert digest.read() == expected_digest

    return finish_run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 8 MiB, all of it this test's."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    with small_disk(tmp_path / "disk", size=8 * 2**20) as disk:
        yield disk
