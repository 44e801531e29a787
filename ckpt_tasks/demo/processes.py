"""Servers as child processes: on free loopback ports, waited for, ended with what they started."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ckpt_tasks.demo.families import end_families
from ckpt_tasks.demo.watcher import Watcher
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.process import this_process

__all__ = ["Server", "end_servers", "free_port", "is_up", "undisturbed", "wait_until"]

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
    watcher
        Ends it where this process cannot.
    """

    def __init__(
        self, *module: str, environment: Mapping[str, str], log: Path, watcher: Watcher
    ) -> None:
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
        self.identity = this_process(self.process.pid)
        watcher.watch(self.identity)

    @property
    def running(self) -> bool:
        return self.process.poll() is None


def end_servers(*servers: Server, grace: float) -> None:
    """End the servers with all that they have started, by force where it takes too long.

    Parameters
    ----------
    grace
        Seconds for the servers, and as much again for what they have started.
    """
    with undisturbed():
        end_families([server.identity for server in servers], grace=grace)
        for server in servers:
            server.process.wait()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Have signals that would end this process wait until the block is left.

    A second Ctrl-C would leave servers behind that hold their ports.
    """
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
