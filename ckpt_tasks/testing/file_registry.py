"""A registry in a file: what it was told outlives the processes that told it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ckpt_tasks.testing.memory_registry import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.registry_wrappers import WrapperRegistry

__all__ = ["FileRegistry", "read_memory"]

T = TypeVar("T")


class FileRegistry(WrapperRegistry):
    """`MemoryRegistry`, with its memory in a file; for tests that kill processes by the thousand.

    Each operation takes effect as a whole or not at all, whenever the process is killed.

    Parameters
    ----------
    path
        Of the file, made when it is needed. Several registries may use it at once.
    """

    def __init__(self, path: Path) -> None:
        self._memory = RegistryMemory()
        self._path = path
        super().__init__(MemoryRegistry(self._memory))

    def _run(self, operation: str, subject: str, call: Callable[[], T]) -> T:
        with self._path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._path.read_bytes() if self._path.exists() else b""
            if before:
                self._memory.load(before)
            result = call()
            after = self._memory.dump()
            if after != before:
                self._replace(after)
            return result

    def _replace(self, data: bytes) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(self._path)


def read_memory(path: Path) -> RegistryMemory:
    """What the registry in a file holds; nothing where there is none."""
    memory = RegistryMemory()
    if path.exists():
        memory.load(path.read_bytes())
    return memory
