"""What the kernel tells of processes: their time and memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["anonymous_bytes", "cpu_seconds", "memory_file_bytes"]

_TICKS = os.sysconf("SC_CLK_TCK")
_USER, _SYSTEM = 11, 12  # of the fields behind the command's name in /proc/PID/stat, proc(5)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that these processes have taken; nothing for those that are gone."""
    total = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat.rpartition(")")[2].split()
        total += int(fields[_USER]) + int(fields[_SYSTEM])
    return total / _TICKS


def anonymous_bytes(pid: int | str) -> int:
    """Resident memory that only this process has: not files, and nothing shared."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return 1024 * int(value)


def memory_file_bytes() -> int:
    """What the anonymous files in memory hold that this process has open, memfd_create(2).

    Not by what is resident: a page counts as that only once this process has touched it through
    its present mapping, and another one may have.
    """
    held: dict[int, int] = {}
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the scan's own
            if os.readlink(entry.path).startswith("/memfd:"):
                stat = os.stat(entry.path)
                held[stat.st_ino] = stat.st_blocks * 512
    return sum(held.values())
