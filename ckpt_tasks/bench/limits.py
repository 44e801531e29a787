"""What the machine and the storage allow at most, for the same bytes."""

from __future__ import annotations

import mmap
import uuid
from concurrent.futures import ThreadPoolExecutor

from ckpt_tasks.bench.measure import Contestant
from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.store.base import Store

__all__ = ["Limits"]

_STEP_BYTES = 2 * CHUNK_BYTES
_READERS = 4


class Limits:
    """The bare operations that a save and a load are made of.

    Parameters
    ----------
    store
        A scratch one.
    state
        What is copied; its bytes are what is written and read.
    """

    def __init__(self, store: Store, state: CapturedState) -> None:
        self._store = store
        self._state = state
        self._offsets: list[int] = []
        size = 0
        for image in state.tensors:
            self._offsets.append(size)
            size += image.nbytes
        self.size = size
        self._path = f"ckpt-tasks-bench-{uuid.uuid4().hex[:8]}/raw"
        self._arena = Arena()
        self._memory = self._arena.reserve(_padded(size))

    def contestants(self) -> list[Contestant]:
        """``copy``, ``hash``, ``raw write`` and ``raw read``."""
        return [
            Contestant(name="copy", run=lambda number: self.copy()),
            Contestant(name="hash", run=lambda number: self._hash()),
            Contestant(
                name="raw write",
                prepare=lambda number: self.remove(),
                run=lambda number: self._write(),
            ),
            Contestant(name="raw read", run=lambda number: self._read()),
        ]

    def remove(self) -> None:
        """Delete what was written."""
        self._store.delete(self._path)

    def close(self) -> None:
        """The same, and give the memory back."""
        self.remove()
        self._memory = memoryview(b"")
        self._arena.close()

    def copy(self) -> None:
        """Copy the state, as a save does, to memory that is warm after the first time."""
        self._state.copy_into(self._memory, self._offsets)

    def _hash(self) -> None:
        for start, stop in chunk_spans(self.size):
            digest(self._memory[start:stop])

    def _write(self) -> None:
        self._store.write(self._path, [self._memory[: self.size]], self.size)

    def _read(self) -> None:
        def read(start: int) -> None:
            stop = min(start + _STEP_BYTES, self.size)
            self._store.read_into(
                self._path, start, stop, self._memory[start : start + _STEP_BYTES]
            )

        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(read, range(0, self.size, _STEP_BYTES)):
                pass


def _padded(size: int) -> int:
    """Whole pages: what lies behind the last byte may be overwritten by a read."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
