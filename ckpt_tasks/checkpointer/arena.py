"""The arena: memory that holds the image of a checkpoint's files, reused for every save.

A fresh copy of the state for each save would first have to be touched, which takes several times
as long as copying into memory that is there already.

It is an anonymous file in memory (memfd_create(2)), which the writer's process maps as well. It
has no name: whichever processes are killed, the kernel takes it back with the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable

from ckpt_tasks.errors import StoreError

__all__ = ["Arena", "map_arena"]

_STEP_BYTES = 16 * 1024 * 1024
_LEAST_ROOM = 1024 * 1024


class Arena:
    """Page-aligned memory that grows and never shrinks.

    It is a shared mapping: a process forked meanwhile, such as a loader's worker, makes no copy
    of its pages.

    Parameters
    ----------
    has_file
        Another process is to map it; else it is memory of this process, behind which there is no
        file.
    """

    def __init__(self, *, has_file: bool = True) -> None:
        self._has_file = has_file
        self._descriptor: int | None = None
        self._memory: mmap.mmap | None = None
        self._touching: threading.Thread | None = None
        self._release: Callable[[], object] = lambda: None

    @property
    def descriptor(self) -> int:
        """Of the file behind it, for another process to map; `StoreError` where none can be had."""
        if self._descriptor is None:
            try:
                self._descriptor = os.memfd_create("ckpt-tasks-arena", os.MFD_CLOEXEC)
            except OSError as error:
                raise StoreError(f"no memory to stage a checkpoint: {error.strerror}") from error
            self._release = weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def prepare(self, size: int) -> None:
        """Have `size` bytes touched in the background, at half of one processor's time."""
        if self._memory is not None or not size:
            return
        with contextlib.suppress(StoreError):  # the save that wants it tells
            self._memory = self._mapped(size)
            self._touching = threading.Thread(
                target=_touch, args=(self._memory, size), name="arena", daemon=True
            )
            self._touching.start()

    def reserve(self, size: int) -> memoryview:
        """The first `size` bytes, whatever they hold.

        Only one view is used at a time: what an earlier one shows may move.

        Raises
        ------
        StoreError
            There is no memory for it: the save fails, and training goes on.
        """
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        if self._memory is None or len(self._memory) < size:
            self._memory = self._mapped(size)
        return memoryview(self._memory)[:size]

    def _mapped(self, size: int) -> mmap.mmap:
        return map_arena(self.descriptor if self._has_file else None, size, room=_room(size))

    def close(self) -> None:
        """Give the memory back, once nobody uses a view of it any more."""
        if self._touching is not None:
            self._touching.join()
        self._memory = self._touching = None
        self._release()
        self._descriptor = None


def map_arena(descriptor: int | None, size: int, *, room: int = 0) -> mmap.mmap:
    """Map the first `size` bytes of an arena's file, which is grown where it is smaller.

    Parameters
    ----------
    descriptor
        Of the file; ``None`` for memory without one.
    room
        Further bytes, which take no memory until they are touched.

    Raises `StoreError` where there is no memory for it.
    """
    try:
        length = max(size + room, 1)
        if descriptor is not None and os.fstat(descriptor).st_size < length:
            os.ftruncate(descriptor, length)
        memory = mmap.mmap(-1 if descriptor is None else descriptor, length)
    except OSError as error:
        raise StoreError(
            f"no memory to stage a checkpoint: {size} bytes, as many as the state has, were needed "
            f"({error.strerror})"
        ) from error
    with contextlib.suppress(OSError):  # a kernel without them: touching takes twice as long
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _room(size: int) -> int:
    """For what is handed over with an image: mapping it anew would cost each page a fault."""
    return max(_LEAST_ROOM, size // 32)


def _touch(memory: mmap.mmap, size: int) -> None:
    with memoryview(memory) as view:
        for start in range(0, size, _STEP_BYTES):
            began = time.perf_counter()
            step = view[start : min(start + _STEP_BYTES, size)]
            # Called without the interpreter's lock, unlike all that `mmap` offers for it.
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(step)), 0, step.nbytes)
            time.sleep(time.perf_counter() - began)
