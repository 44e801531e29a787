"""Which process this is, and whether another one still lives on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from ckpt_tasks.format.records import Process, Uptime

__all__ = ["end_process", "process_is_alive", "this_process", "this_uptime"]


def this_process(pid: int | None = None) -> Process:
    """Identity of this process, or of another one (`pid`) in this process's pid namespace."""
    pid = os.getpid() if pid is None else pid
    return Process(
        host=socket.gethostname(), boot_id=_boot_id(), pid=pid, started=_started(pid) or 0
    )


def process_is_alive(process: Process) -> bool | None:
    """Whether exactly this process still runs; ``None`` where that cannot be known from here.

    It can be known on the same host, in the same boot and pid namespace, on Linux.
    """
    here = this_process()
    if (process.host, process.boot_id) != (here.host, here.boot_id) or not here.started:
        return None
    return _started(process.pid) == process.started


def end_process(process: Process, *, timeout: float = 10.0) -> bool:
    """Kill exactly this process, and wait for its end.

    Returns
    -------
    bool
        True when it is known to be gone; False when that cannot be known from here, or it did
        not end within `timeout` seconds. The fence holds either way.
    """
    deadline = time.monotonic() + timeout
    while (alive := process_is_alive(process)) and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    return alive is False


def this_uptime() -> Uptime | None:
    """The time now, as other processes can compare it that run on this machine before it boots
    again; ``None`` where the system tells none.
    """
    try:
        boot = _kernels_boot_id()
    except OSError:
        return None
    return Uptime(boot_id=boot, seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _boot_id() -> str:
    """The kernel's boot id with this pid namespace: pids mean the same only within both."""
    try:
        return f"{_kernels_boot_id()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"


def _kernels_boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot (proc(5), field 22 of stat)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command name, in parentheses, may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    state, started = fields[0], int(fields[19])
    return None if state in ("Z", "X") else started
