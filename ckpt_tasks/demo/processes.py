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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process

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


def end_servers(*servers: Server, grace: float) -> None:
    """SIGTERM to the servers' process groups; then SIGKILL to whatever is left of them.

    Processes that they have started in sessions of their own (trainers that save before they
    stop, say) have `grace` as well.

    Parameters
    ----------
    grace
        Seconds for the servers, and as much again for what they have started.
    """
    with undisturbed():
        family = [this_process(pid) for server in servers for pid in _descendants(server)]
        for server in servers:
            _signal(os.killpg, server.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        for server in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, deadline - time.monotonic()))
            for pid in _session(server.process.pid):
                _signal(os.kill, pid, signal.SIGKILL)
            server.process.wait()
        deadline = time.monotonic() + grace
        while any(map(process_is_alive, family)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for process in family:
            end_process(process)


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


def _descendants(server: Server) -> set[int]:
    """Processes that descend from the server, whatever their sessions."""
    parents: dict[int, int] = {}
    for pid in _processes():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
            # The command's name, in parentheses, may hold spaces (proc(5)).
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {server.process.pid}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= level
    return found


def _session(leader: int) -> list[int]:
    """Processes of a session that are still there."""
    members = []
    for pid in _processes():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                members.append(pid)
    return members


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _signal(send: Callable[[int, int], None], target: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(target, number)
