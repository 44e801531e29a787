"""Measuring several things in turn, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt_tasks.checkpointer.memory import fresh_memory

__all__ = ["Contestant", "Measured", "alternate", "median_ratio"]


class Contestant(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be measured.

    Parameters
    ----------
    prepare
        Called before each measurement, not measured.
    run
        What is measured; given the number of the round.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[int], object] = lambda number: None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Wall and processor seconds of each round."""

    name: str
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)


def alternate(
    contestants: Sequence[Contestant], rounds: int, *, memory: int = 0
) -> dict[str, Measured]:
    """Measure all of them `rounds` times, one after the other in each round.

    A round before them is not counted: it loads libraries, and touches memory that is reused.

    Parameters
    ----------
    memory
        Bytes that are touched and released before each. A virtual machine's host takes back what
        is free for some seconds, and gives it again slowly: without this, who comes next finds
        memory that is fast, and who comes after a pause pays for all.
    """
    seconds: Mapping[str, list[float]] = {c.name: [] for c in contestants}
    cpu: Mapping[str, list[float]] = {c.name: [] for c in contestants}
    for number in range(rounds + 1):
        for contestant in contestants:
            contestant.prepare(number)
            gc.collect()
            _touch(memory)
            began, cpu_began = time.perf_counter(), time.process_time()
            result = contestant.run(number)
            took, cpu_took = time.perf_counter() - began, time.process_time() - cpu_began
            del result
            if number:
                seconds[contestant.name].append(took)
                cpu[contestant.name].append(cpu_took)
    return {
        c.name: Measured(name=c.name, seconds=seconds[c.name], cpu_seconds=cpu[c.name])
        for c in contestants
    }


def _touch(size: int) -> None:
    memory = fresh_memory(size)
    if size:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, size)


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios: what disturbs one round disturbs both of its parts."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))
