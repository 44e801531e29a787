"""Memory that saves take beyond the state itself."""

from __future__ import annotations

import gc

from ckpt_tasks.bench.asynchronous import OursAsync
from ckpt_tasks.bench.processes import anonymous_bytes, memory_file_bytes
from ckpt_tasks.bench.report import Memory

__all__ = ["measure_memory", "resident"]


def resident() -> int:
    """Bytes of this process's own, and of the arenas that it shares with writers."""
    gc.collect()
    return anonymous_bytes("self") + memory_file_bytes()


def measure_memory(ours: OursAsync, before: int, size: int, *, saves: int) -> Memory:
    """After one save, and after `saves`, of trainer and writer together.

    Parameters
    ----------
    before
        What `resident` gave before `ours` was made.
    size
        Bytes of the state.
    """
    held: list[float] = []
    for number in range(saves):
        ours.save(number)
        assert ours.writer is not None
        total = resident() - before + anonymous_bytes(ours.writer)
        held.append(total / size)
    return Memory(saves=saves, after_first=held[0], after_last=held[-1])
