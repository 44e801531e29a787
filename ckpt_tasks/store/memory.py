"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from ckpt_tasks.store.filesystem import BoundedFileSystem
from ckpt_tasks.store.generic import FsspecStore

__all__ = ["MemoryStore"]

_lock = threading.Lock()  # fsspec's memory file system is one per process, and so is this


class _Memory(BoundedFileSystem):
    """It never waits, and a thread for an operation takes longer than the operation."""

    def within(self, seconds: float, act: Callable[[], Any]) -> Any:
        return act()


class MemoryStore(FsspecStore):
    """Objects in fsspec's ``memory:`` file system, shared by all stores of this process.

    `create` is atomic among the threads of the process: there are no other writers.

    Parameters
    ----------
    root
        Path in the memory file system.
    """

    supports_conditional_create = True
    is_shared = False

    def __init__(self, root: str) -> None:
        root = "/" + root.strip("/")
        super().__init__(MemoryFileSystem(), root, f"memory:/{root}")

    def create(self, path: str, data: bytes) -> None:
        with _lock:
            super().create(path, data)

    def _bounded(self, filesystem: Any) -> BoundedFileSystem:
        return _Memory(filesystem)

    def _make_parent(self, full: str) -> None:
        """Folders need not be made here, and those made would stay after their objects."""
