"""Memory that saves take beyond the state itself."""

from __future__ import annotations

import gc

from ckpt_tasks.bench.asynchronous import OursAsync
from ckpt_tasks.bench.processes import memory_bytes
from ckpt_tasks.bench.report import Memory

__all__ = ["measure_memory", "resident"]


def resident() -> int:
    """Bytes of this process that are its own or shared."""
    gc.collect()
    return memory_bytes("self", "Anon", "Shmem")


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
        # The arena is one memory that both have mapped: it counts once.
        total = resident() - before + memory_bytes(ours.writer, "Anon")
        held.append(total / size)
    return Memory(saves=saves, after_first=held[0], after_last=held[-1])
