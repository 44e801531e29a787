"""Families of processes: a leader, in a session of its own, and all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process
from ckpt_tasks.format.records import Process

__all__ = ["end_families"]

_POLL_SECONDS = 0.2


def end_families(leaders: Iterable[Process], *, grace: float) -> None:
    """SIGTERM to the leaders' process groups; then SIGKILL to whatever is left of them.

    Processes that they have started in sessions of their own (trainers that save before they
    stop, say) have `grace` as well.

    Parameters
    ----------
    leaders
        A process that has got the pid of one of them since is left alone.
    grace
        Seconds for the leaders, and as much again for what they have started.
    """
    leaders = [leader for leader in leaders if not _is_another(leader)]
    family = [this_process(pid) for leader in leaders for pid in _descendants(leader.pid)]
    for leader in leaders:
        _signal(os.killpg, leader.pid, signal.SIGTERM)
    _wait_for_end(leaders, grace)
    for leader in leaders:
        if not _is_another(leader):
            for pid in _session(leader.pid):
                _signal(os.kill, pid, signal.SIGKILL)
    _wait_for_end(family, grace)
    for process in family:
        end_process(process)


def _is_another(leader: Process) -> bool:
    """Whether its pid is another process's now; not while one of its session is left."""
    return this_process(leader.pid).started not in (0, leader.started)


def _wait_for_end(processes: list[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(process_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _descendants(leader: int) -> set[int]:
    """Processes that descend from the leader, whatever their sessions."""
    parents: dict[int, int] = {}
    for pid in _processes():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
            # The command's name, in parentheses, may hold spaces (proc(5)).
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {leader}
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
