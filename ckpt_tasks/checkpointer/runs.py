"""Copying the bytes that a block of a tensor has of another, as they come piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from ckpt_tasks.checkpointer.windows import copy_bytes
from ckpt_tasks.format.blocks import Runs

__all__ = ["Target", "copy_runs", "pieces_with"]

_SHORT_BYTES = 16 * 1024  # copied sooner than the interpreter's lock is given up and taken again
_MANY_COLUMNS = 64  # beyond it a run takes longer by its items than as a whole


class Target(NamedTuple):
    """Where bytes go."""

    runs: Runs
    memory: memoryview


def copy_runs(target: Target, start: int, data: memoryview) -> None:
    """Copy what `data`, the bytes of an image from `start` on, has for a target."""
    _Copying(target, start, data).copy(0, target.runs.source, target.runs.target)


class _Copying:
    """One call of `copy_runs`. (A function that calls itself would be a cycle, and hold the memory
    of both sides until the interpreter looks for cycles.)
    """

    __slots__ = ("_data", "_memory", "_runs", "_start", "_stop", "_widths")

    def __init__(self, target: Target, start: int, data: memoryview) -> None:
        self._runs, self._memory = target
        self._widths = self._runs.widths
        self._data = data
        self._start, self._stop = start, start + data.nbytes

    def copy(self, level: int, source: int, to: int) -> None:
        """The runs of a level and those within, the first of which begins at these bytes."""
        runs, start = self._runs, self._start
        if level == len(runs.steps):
            _copy_run(self._memory, self._data, to, source - start, runs.length)
            return
        count, source_step, target_step = runs.steps[level]
        first = max(0, (start - source - self._widths[level + 1]) // source_step + 1)
        last = min(count, -((source - self._stop) // source_step))
        if level == len(runs.steps) - 1:
            inner = max(first, -((source - start) // source_step))
            outer = min(last, (self._stop - runs.length - source) // source_step + 1)
            here = _Column(to + inner * target_step, target_step, self._memory)
            there = _Column(source + inner * source_step - start, source_step, self._data)
            if _copy_columns(here, there, outer - inner, runs.length):
                for number in (*range(first, inner), *range(outer, last)):
                    self.copy(level + 1, source + number * source_step, to + number * target_step)
                return
        for number in range(first, last):
            self.copy(level + 1, source + number * source_step, to + number * target_step)


def _copy_run(memory: memoryview, data: memoryview, to: int, source: int, length: int) -> None:
    """One run, as far as `data` has it."""
    first, last = max(source, 0), min(source + length, data.nbytes)
    if first >= last:
        return
    to += first - source
    if last - first < _SHORT_BYTES:
        memory[to : to + last - first] = data[first:last]
    else:
        copy_bytes(memory[to : to + last - first], data[first:last])


class _Column(NamedTuple):
    """Where the first of many runs begins in memory, and how far it is from one to the next."""

    first: int
    step: int
    memory: memoryview

    def items(self, number: int, count: int, unit: int) -> memoryview[int]:
        """The `number`-th item of so many bytes of each run."""
        items = self.memory[: self.memory.nbytes // unit * unit].cast(_FORMATS[unit])
        first, step = self.first // unit + number, self.step // unit
        return items[first : first + (count - 1) * step + 1 : step]


_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _copy_columns(here: _Column, there: _Column, count: int, length: int) -> bool:
    """Copy many short runs item by item of each: millions of runs would take a minute in turn.

    Does nothing, and returns false, where they are few or long.
    """
    unit = math.gcd(8, length, here.first, here.step, there.first, there.step)
    columns = length // unit
    if count <= columns or columns > _MANY_COLUMNS:
        return False
    for number in range(columns):
        here.items(number, count, unit)[:] = there.items(number, count, unit)
    return True


def pieces_with(runs: Runs, size: int) -> Iterator[int]:
    """Numbers of the pieces of so many bytes that hold some of the runs, perhaps more than once."""
    for start, stop in _spans(runs, 0, runs.source, size):
        yield from range(start // size, -(-stop // size))


def _spans(runs: Runs, level: int, source: int, gap: int) -> Iterator[tuple[int, int]]:
    """Bytes that runs lie in: no `gap` bytes together, of those within, are without any."""
    if level == len(runs.steps) or runs.steps[level][1] <= gap:
        yield source, source + runs.widths[level]
        return
    count, step, _ = runs.steps[level]
    for number in range(count):
        yield from _spans(runs, level + 1, source + number * step, gap)
