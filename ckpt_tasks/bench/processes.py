"""What the kernel tells of processes: their time and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cpu_seconds", "memory_bytes"]

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


def memory_bytes(pid: int | str, *kinds: str) -> int:
    """Resident memory of a process.

    Parameters
    ----------
    kinds
        Of ``Anon``, ``File`` and ``Shmem``, as /proc/PID/status has them.
    """
    wanted = {f"Rss{kind}" for kind in kinds}
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = (line.partition(":") for line in lines)
    return sum(1024 * int(value.split()[0]) for name, _, value in values if name in wanted)
