"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import threading
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from ckpt_tasks.store.filesystem import BoundedFileSystem, DirectFileSystem
from ckpt_tasks.store.generic import FsspecStore

__all__ = ["MemoryStore"]

_lock = threading.Lock()  # fsspec's memory file system is one per process, and so is this


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
        # A thread for an operation takes longer than the operation.
        return DirectFileSystem(filesystem)

    def _make_parent(self, full: str) -> None:
        """Folders need not be made here, and those made would stay after their objects."""
