"""What a save does besides copying and writing: looking at the state, planning, describing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ckpt_tasks.bench.ours import checkpointer_of, new_run, request
from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.drain import Drain
from ckpt_tasks.checkpointer.job import SaveJob
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.state.capture import CapturedState, capture

__all__ = ["planning_seconds"]


def planning_seconds(items: Mapping[str, Any], rounds: int) -> float:
    """Median seconds of capture, plan and encoding, of saves after the first."""
    checkpointer = checkpointer_of(_Nowhere(), new_run())
    seconds: list[float] = []
    try:
        for number in range(rounds + 1):
            began = time.perf_counter()
            state = capture(items)
            checkpointer.save(_Uncopied(state.trees, state.tensors), request(number))
            if number:
                seconds.append(time.perf_counter() - began)
    finally:
        checkpointer.close()
    return statistics.median(seconds)


class _Uncopied(CapturedState):
    """A state whose tensors stay where they are."""

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        pass

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        return []


class _Nowhere(Drain):
    """Encodes what it is handed, as for a writer, and writes nothing."""

    is_concurrent = False

    def __init__(self) -> None:
        self._record: CommitRecord | None = None

    def prepare(self, arena: Arena) -> None:
        pass

    def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
        msgspec.msgpack.encode(job)
        self._record = job.draft

    def poll(self, timeout: float) -> CommitRecord | None:
        return self._record
