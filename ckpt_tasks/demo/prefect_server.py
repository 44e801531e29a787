"""A Prefect server of the demo's own, on loopback, its data beside the demo's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ckpt_tasks.demo.processes import Server, end_servers, free_port, is_up, wait_until
from ckpt_tasks.demo.watcher import Watcher

__all__ = ["prefect_environment", "prefect_server"]

_START_SECONDS = 180.0
_END_SECONDS = 15.0


def prefect_environment(home: Path) -> dict[str, str]:
    """The environment in which Prefect keeps to `home` and calls nobody."""
    return {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_PROMPT": "false",
    }


@contextlib.contextmanager
def prefect_server(home: Path, watcher: Watcher) -> Iterator[str]:
    """Start a server, wait for its health, yield its pages' address, end its processes.

    Its API lies at ``/api`` below that.

    Parameters
    ----------
    home
        Takes the database; that of an earlier one, or a fresh folder.
    watcher
        Ends the server where this process cannot.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    server = Server(
        *("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)),
        environment=prefect_environment(home),
        log=home / "server.log",
        watcher=watcher,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: is_up(f"{url}/api/health"),
            [server],
            within=_START_SECONDS,
            what="the Prefect server is up",
        )
        yield url
    finally:
        end_servers(server, grace=_END_SECONDS)
