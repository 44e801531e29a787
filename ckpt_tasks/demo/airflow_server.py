"""Airflow of one's own on loopback: SQLite, LocalExecutor, no login, no examples.

What ``airflow standalone`` starts, each component a process of its own: its SIGTERM would leave
them behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ckpt_tasks.demo.airflow_api import AirflowApi
from ckpt_tasks.demo.processes import Server, end_servers, free_port, is_up, undisturbed, wait_until
from ckpt_tasks.demo.watcher import Watcher
from ckpt_tasks.errors import CkptTasksError

__all__ = ["airflow_environment", "airflow_server"]

_START_SECONDS = 300.0
_END_SECONDS = 15.0
_COMPONENTS = {
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "triggerer": ("triggerer", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
    "api-server": ("api-server",),
}


def airflow_environment(home: Path, dags: Path, port: int) -> dict[str, str]:
    """The environment in which Airflow keeps to `home` and calls nobody.

    Nothing that the caller's environment says of another Airflow reaches it: that one's database
    would be migrated.

    Parameters
    ----------
    home
        Takes the database, the configuration and the logs.
    dags
        Folder of DAG files.
    port
        Of the API server.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW_"))}
    url = f"http://127.0.0.1:{port}"
    return {
        **inherited,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


@contextlib.contextmanager
def airflow_server(
    home: Path, dags: Path, settings: Mapping[str, str] | None = None
) -> Iterator[AirflowApi]:
    """Start Airflow, wait for its health, yield its API, end all of its processes.

    Tasks that run at the end are stopped first, so that what they train is saved.

    Parameters
    ----------
    home
        Of an earlier one, or a fresh folder.
    dags
        Folder of DAG files.
    settings
        Further environment variables: of Airflow (``AIRFLOW__CORE__...``), and of the tasks.

    Raises
    ------
    CkptTasksError
        It did not come up; names the log to look into.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {**airflow_environment(home, dags, port), **(settings or {})}
    with Watcher() as watcher:
        _migrate(home, environment, watcher)
        with _running(home, environment, watcher) as api:
            yield api


@contextlib.contextmanager
def _running(home: Path, environment: Mapping[str, str], watcher: Watcher) -> Iterator[AirflowApi]:
    api = AirflowApi(environment["AIRFLOW__API__BASE_URL"])
    servers = {
        name: Server(
            *("airflow", *arguments),
            environment=environment,
            log=home / f"{name}.log",
            watcher=watcher,
        )
        for name, arguments in _COMPONENTS.items()
    }
    try:
        wait_until(
            lambda: _is_healthy(api), servers.values(), within=_START_SECONDS, what="Airflow is up"
        )
        yield api
    finally:
        with undisturbed():
            # First, while there is still an API that its tasks can tell how they ended.
            end_servers(servers.pop("scheduler"), grace=_END_SECONDS)
            end_servers(*servers.values(), grace=_END_SECONDS)


def _migrate(home: Path, environment: Mapping[str, str], watcher: Watcher) -> None:
    migration = Server(
        *("airflow", "db", "migrate"),
        environment=environment,
        log=home / "db-migrate.log",
        watcher=watcher,
    )
    try:
        code = migration.process.wait(_START_SECONDS)
    finally:
        end_servers(migration, grace=_END_SECONDS)
    if code != 0:
        raise CkptTasksError(f"airflow db migrate ended with {code}; see {migration.log}")


def _is_healthy(api: AirflowApi) -> bool:
    """Whether every component has reported to the database."""
    if not is_up(f"{api.url}/api/v2/monitor/health"):
        return False
    health = api.call("GET", "monitor/health")
    return all(part["status"] == "healthy" for part in health.values())
