"""A real MLflow server for tests: started, stopped and started again on the same port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import requests


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """An ``mlflow server`` on SQLite, with artifacts served from a folder.

    Parameters
    ----------
    folder
        Holds the database, the artifacts and the log; survives `stop`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.backend_uri = f"sqlite:///{folder}/mlflow.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, timeout: float = 120.0) -> MlflowServer:
        """Start it on its port and return when it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_healthy(time.monotonic() + timeout)
        return self

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", self.backend_uri),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]

    @staticmethod
    def _environment() -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        return {
            **kept,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # Its job runners, which no test needs, are seven more processes that import MLflow.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def _wait_until_healthy(self, deadline: float) -> None:
        assert self._process is not None
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.uri}/health", timeout=5).ok:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                code = self._process.poll()
                log = (self.folder / "server.log").read_text(errors="replace")[-4000:]
                self.stop()
                raise RuntimeError(f"the MLflow server did not start (exit code {code}):\n{log}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and its workers; the port refuses connections afterwards."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def __enter__(self) -> MlflowServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
