"""Servers as child processes: on free loopback ports, waited for, ended with what they started."""

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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ckpt_tasks.errors import CkptTasksError

__all__ = ["Server", "free_port", "is_up", "wait_until"]

_POLL_SECONDS = 0.2


class Server:
    """``python -m ...`` in a session of its own, its output in a file.

    Parameters
    ----------
    module
        What follows ``python -m``.
    environment
        All of the process's environment.
    log
        Takes what it prints.
    """

    def __init__(self, *module: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = " ".join(module)
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env=environment,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, grace: float) -> None:
        """SIGTERM to its process group; after `grace` seconds SIGKILL to its whole session.

        A session, as a server's children may have left its process group.

        Parameters
        ----------
        grace
            Seconds.
        """
        _signal(os.killpg, self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        for pid in _session(self.process.pid):
            _signal(os.kill, pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_up(url: str) -> bool:
    """Whether a page answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_until(
    condition: Callable[[], bool], servers: Iterable[Server], *, within: float, what: str
) -> None:
    """Wait until `condition` holds, as long as every one of `servers` runs.

    Parameters
    ----------
    within
        Seconds.
    what
        What is waited for, for the error's text.

    Raises
    ------
    CkptTasksError
        A server has ended, or it took too long; names the log to look into.
    """
    servers = list(servers)
    deadline = time.monotonic() + within
    while not condition():
        ended = next((server for server in servers if not server.running), None)
        if ended is not None:
            raise CkptTasksError(
                f"{what}: {ended.name!r} ended with {ended.process.returncode}; see {ended.log}"
            )
        if time.monotonic() > deadline:
            logs = ", ".join(str(server.log) for server in servers)
            raise CkptTasksError(f"{what}: not within {within:g} s; see {logs}")
        time.sleep(_POLL_SECONDS)


def _session(leader: int) -> list[int]:
    """Processes of a session that are still there, its leader among them."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == leader:
                    members.append(int(entry.name))
    return members


def _signal(send: Callable[[int, int], None], target: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(target, number)
