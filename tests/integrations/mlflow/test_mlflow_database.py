"""A database that MLflow opens directly survives whoever opens it first, at once or killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.integrations.mlflow import MlflowRegistry, database
from ckpt_tasks.integrations.mlflow.connection import Connection
from ckpt_tasks.testing.registry import example_description, example_record, rows_of

EXPERIMENT = "first"
PROCESSES = 4

HOLDER = """
import sys, time
from ckpt_tasks.integrations.mlflow import database
with database.opening(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""

KILLED_IN_A_MIGRATION = """
import os, signal, sys
from sqlalchemy import Engine, event
from ckpt_tasks.integrations.mlflow.connection import Connection
@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *others):
    if statement.startswith("INSERT INTO _alembic_tmp_"):
        os.kill(os.getpid(), signal.SIGKILL)
Connection(sys.argv[1]).client
"""


def train(uri: str, uid: str) -> None:
    """What the first process of a run does with a registry, from opening it on."""
    registry = MlflowRegistry(RegistryConfig(tracking_uri=uri, experiment=EXPERIMENT))
    description = example_description(uid=uid)
    registry.open_run(
        registry.find_run(description) or registry.create_run(description), description
    )
    registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
    record = example_record(description, 3, metrics={"loss": 1.0})
    registration = registry.register(record, uri="s3://bucket/x.json", manifest=encode(record))
    registry.set_alias(f"resume-{uid}", registration)
    registry.end_run("finished")


def train_each(uris: list[str], uid: str, barrier: Barrier) -> None:
    for uri in uris:
        barrier.wait()
        train(uri, uid)


def run_in_processes(uris: list[str], uids: list[str]) -> list[int | None]:
    """Exit codes of one process per uid, which open each database at the same moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "mlflow.store.tracking.sqlalchemy_store"])
    barrier = context.Barrier(len(uids), timeout=60)
    children = [context.Process(target=train_each, args=(uris, uid, barrier)) for uid in uids]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def assert_one_of_each(uri: str, uids: list[str]) -> None:
    client = MlflowClient(uri, registry_uri=uri)
    experiments = {found.name: found.experiment_id for found in client.search_experiments()}
    assert set(experiments) == {"Default", EXPERIMENT}
    runs = client.search_runs([experiments[EXPERIMENT]])
    assert sorted(run.data.tags["ckpt.uid"] for run in runs) == sorted(uids)
    assert {(run.info.status, run.data.metrics["loss"]) for run in runs} == {("FINISHED", 1.0)}
    (model,) = client.search_registered_models()
    assert set(model.aliases) == {f"resume-{uid}" for uid in uids}
    versions = client.search_model_versions()
    assert {version.run_id for version in versions} == {run.info.run_id for run in runs}
    assert len(versions) == len(uids)
    assert len(client.search_logged_models([experiments[EXPERIMENT]])) == len(uids)


def test_opened_by_several_processes_at_once(tmp_path: Path) -> None:
    """Each of four processes that open a new database at one moment does its work there, and
    nothing but MLflow's own files stays in the folder; and so with a second database.
    """
    files = [tmp_path / "one" / "mlflow.db", tmp_path / "two" / "mlflow.db"]
    uris = [f"sqlite:///{file}" for file in files]
    uids = [uuid.uuid4().hex for _ in range(PROCESSES)]
    assert run_in_processes(uris, uids) == [0] * PROCESSES
    for uri, file in zip(uris, files, strict=True):
        assert_one_of_each(uri, uids)
        assert {path.name for path in file.parent.iterdir()} == {"mlflow.db", "mlartifacts"}


def test_killed_while_it_makes_the_tables(tmp_path: Path) -> None:
    """Killed by SIGKILL within one of MLflow's migrations, the first process leaves a database
    that the next one opens and uses.
    """
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_MIGRATION, uri], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    train(uri, "next")
    assert_one_of_each(uri, ["next"])


@contextmanager
def held_by_another(uri: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_lock_of_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for another process gives up with an error that names the database, and opens it
    as soon as the other has been killed, the lock file notwithstanding.
    """
    uri = f"sqlite:///{tmp_path}/mlflow.db?api_key=hidden"
    connection = Connection(uri)
    with held_by_another(uri) as holder:
        monkeypatch.setattr(database, "_WAIT_SECONDS", 0.2)
        with (
            pytest.raises(RegistryError, match=r"mlflow\.db\?api_key=\*\*\* was not opened"),
            database.opening(uri),
        ):
            pass
        with pytest.raises(RegistryError, match="other processes have been making"):
            _ = connection.client
        holder.kill()
        holder.wait()
    lock = database.lock_path(uri)
    assert lock is not None
    assert lock.exists()
    with database.opening(uri):
        pass
    assert not lock.exists()


def test_database_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a database that has its tables none are made elsewhere, and what it holds stays."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    train(uri, "before")
    monkeypatch.setattr(database, "MlflowClient", None)
    with database.opening(uri):
        pass
    assert_one_of_each(uri, ["before"])


def test_file_of_another_program(tmp_path: Path) -> None:
    """A SQLite file that already has a table is not written over."""
    file = tmp_path / "other.db"
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE notes (text TEXT)")
    with database.opening(f"sqlite:///{file}"), closing(sqlite3.connect(file)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("notes",)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A database in a folder that this process may only read is opened without a lock."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    train(uri, "before")
    tmp_path.chmod(0o500)
    try:
        with database.opening(uri):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_lock_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One relative path means another database in another folder, and the same as the absolute
    path and as a link to it.
    """
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    here = database.lock_path("sqlite:///mlflow.db")
    assert here == database.lock_path(f"sqlite:///{tmp_path}/mlflow.db")
    assert here == database.lock_path("sqlite+pysqlite:///link/mlflow.db?timeout=5")
    monkeypatch.chdir("other")
    assert database.lock_path("sqlite:///mlflow.db") != here


def test_lock_of_a_database_server() -> None:
    """A database on a server is locked by its address, whoever logs in; no name has a password."""
    first, second = (
        database.lock_path(f"postgresql+psycopg2://me:{password}@db:5432/mlflow")
        for password in ("secret", "changed")
    )
    assert first is not None
    assert first == second
    assert "secret" not in str(first)
    assert first != database.lock_path("postgresql+psycopg2://me:secret@db:5432/other")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_database_in_memory(uri: str) -> None:
    """No process shares it, and nothing is locked."""
    assert database.lock_path(uri) is None
    assert database.is_database(uri)


@pytest.mark.parametrize("uri", ["http://mlflow:5000", "https://x", "databricks", "/a/folder"])
def test_not_a_database(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server or a folder nothing is looked at."""
    monkeypatch.setattr(database, "lock_path", None)
    with database.opening(uri):
        assert not database.is_database(uri)
