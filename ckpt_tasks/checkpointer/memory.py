"""Host memory for what is loaded."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from typing import TypeVar

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.safetensors import TENSOR_ALIGNMENT
from ckpt_tasks.sizes import readable_size

__all__ = ["fresh_memory", "memory_for"]

K = TypeVar("K")


def fresh_memory(size: int) -> memoryview:
    """`size` bytes that nobody has touched yet, from the system and on a page.

    In huge pages where the kernel has them: the first touch of small ones takes longer than
    reading the same bytes from the disk (madvise(2), ``MADV_HUGEPAGE``). Private, as shared
    memory has its own rules for them.

    Raises `ConfigError` for more than the system gives: it says nothing about what is stored.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, max(size, 1), flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"what is to be loaded takes {readable_size(size)} of memory, which this machine does "
            f"not give: {error}"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


def memory_for(sizes: Mapping[K, int]) -> dict[K, memoryview]:
    """Memory of so many bytes for each of some tensors: together, and each begins where torch would
    begin it. No two share a byte.
    """
    starts: dict[K, int] = {}
    end = 0
    for key, size in sizes.items():
        starts[key] = end
        end += -(-size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    memory = fresh_memory(end)
    return {key: memory[starts[key] : starts[key] + size] for key, size in sizes.items()}
