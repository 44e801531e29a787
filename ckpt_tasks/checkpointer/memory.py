"""Host memory for what is loaded."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping

from ckpt_tasks.format.records import TensorEntry
from ckpt_tasks.format.safetensors import TENSOR_ALIGNMENT

__all__ = ["fresh_memory", "memory_for"]


def fresh_memory(size: int) -> memoryview:
    """`size` bytes that nobody has touched yet, from the system and on a page.

    In huge pages where the kernel has them: the first touch of small ones takes longer than
    reading the same bytes from the disk (madvise(2), ``MADV_HUGEPAGE``). Private, as shared
    memory has its own rules for them.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(size, 1), flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


def memory_for(tensors: Mapping[int, TensorEntry]) -> dict[int, memoryview]:
    """Memory for each of some tensors, by position: together, and each where torch would begin it.

    No two share a byte, also where their bytes lie in the same place of a file.
    """
    starts: dict[int, int] = {}
    size = 0
    for position, tensor in tensors.items():
        starts[position] = size
        size += -(-tensor.size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    memory = fresh_memory(size)
    return {p: memory[starts[p] : starts[p] + tensor.size] for p, tensor in tensors.items()}
