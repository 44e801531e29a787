"""Servers that tests of several parts use. One of each per session, started on first use."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from support import s3_servers
from support.mlflow_server import MlflowServer
from support.prefect_server import PrefectServer
from support.s3_proxy import Faults, s3_proxy
from support.s3_servers import CREDENTIALS, S3Server
from xdist.scheduler import LoadFileScheduling

# Its files go to one worker: a second Airflow is a dozen processes and 2 GB more.
_ONE_AIRFLOW = "tests/integrations/airflow/scheduler/"


class _FewServers(LoadFileScheduling):
    """A worker gets all tests of a file, and one worker all that share an Airflow."""

    def _split_scope(self, nodeid: str) -> str:
        return _ONE_AIRFLOW if nodeid.startswith(_ONE_AIRFLOW) else super()._split_scope(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C reaches what tests start, also where pytest itself was started behind a ``&``."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _FewServers | None:
    """How ``--dist loadfile`` shares the tests out."""
    return _FewServers(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real object store, which honours conditions."""
    with s3_servers.seaweedfs_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An emulated S3, quick, and not picky about signatures: for faults."""
    with s3_servers.moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def faulty_s3(moto_server: S3Server) -> Iterator[tuple[S3Server, Faults]]:
    """An emulated S3 behind a proxy, and the faults that the proxy makes."""
    with s3_proxy(moto_server) as proxied:
        yield proxied


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Credentials for the servers above in the environment, and no others."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return CREDENTIALS


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server that no test stops; those that do start one of their own."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real Prefect server; who asks it must point Prefect's client at it."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect-server"))
    yield server
    server.close()
