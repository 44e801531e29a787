"""A real Prefect server on a free loopback port, and runners that serve flows to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], T | None], *, timeout: float, what: str) -> T:
    """Poll `condition` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s")
        time.sleep(0.1)


class ProcessGroup:
    """A child process in a group of its own, its output in a file, ended as a whole."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL the whole group at once."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def close(self, grace: float = 10.0) -> None:
        """SIGTERM, and SIGKILL for what is left of the group after `grace` seconds."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


class PrefectServer:
    """A server with a home of its own, under `folder`.

    Attributes
    ----------
    api_url, ui_url
        For clients and for browsers.
    environment
        Variables for processes that talk to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = free_port()
        self.ui_url = f"http://127.0.0.1:{port}"
        self.api_url = f"{self.ui_url}/api"
        home = folder / "prefect"
        home.mkdir(parents=True)
        self.environment: dict[str, str] = {
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_CLI_PROMPT": "false",
            "PREFECT_CLI_COLORS": "false",
        }
        self._server = ProcessGroup(
            [
                *(sys.executable, "-m", "prefect", "server", "start"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            env=self.process_environment(),
            cwd=folder,
            log=folder / "server.log",
        )
        wait_until(self._healthy, timeout=120, what="the Prefect server is healthy")

    def process_environment(self, **more: str) -> dict[str, str]:
        """The environment of this process, pointed at the server."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        return {**inherited, **self.environment, **more}

    def start_script(self, script: Path, *, log: Path, **environment: str) -> ProcessGroup:
        """Run a Python file that serves a deployment."""
        return ProcessGroup(
            [sys.executable, str(script)],
            env=self.process_environment(**environment),
            cwd=script.parent,
            log=log,
        )

    def run_cli(self, *arguments: str, cwd: Path, timeout: float = 90) -> str:
        """Run ``python -m ARGUMENTS`` against the server; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            env=self.process_environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{arguments} exited with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def close(self) -> None:
        self._server.close()

    def _healthy(self) -> bool:
        if self._server.process.poll() is not None:
            raise AssertionError(f"the Prefect server ended:\n{self._server.output()}")
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=2) as answer:  # noqa: S310 - our own http URL
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def flow_run_logs(client: Any, flow_run_id: Any) -> list[str]:
    """Messages that a flow run has logged on the server, in order."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    logs = client.read_logs(
        log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])),
        sort=LogSort.TIMESTAMP_ASC,
        limit=200,
    )
    return [log.message for log in logs]
