"""The arena: memory that holds the image of a checkpoint's files, reused for every save.

A fresh copy of the state for each save would first have to be touched, which takes several times
as long as copying into memory that is there already.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time

from ckpt_tasks.errors import StoreError

__all__ = ["Arena"]

_STEP_BYTES = 16 * 1024 * 1024


class Arena:
    """Page-aligned memory that grows and never shrinks.

    It is a shared mapping: a process forked meanwhile, such as a loader's worker, makes no copy
    of its pages.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._touching: threading.Thread | None = None

    def prepare(self, size: int) -> None:
        """Have `size` bytes touched in the background, at half of one processor's time."""
        if self._memory is not None or not size:
            return
        with contextlib.suppress(StoreError):  # the save that wants it tells
            self._memory = _mapped(size)
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
            self._memory = _mapped(size)
        return memoryview(self._memory)[:size]


def _mapped(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, max(size, 1))
    except OSError as error:
        raise StoreError(
            f"no memory to stage a checkpoint: {size} bytes, as many as the state has, were needed "
            f"({error.strerror})"
        ) from error


def _touch(memory: mmap.mmap, size: int) -> None:
    with memoryview(memory) as view:
        for start in range(0, size, _STEP_BYTES):
            began = time.perf_counter()
            step = view[start : min(start + _STEP_BYTES, size)]
            # Called without the interpreter's lock, unlike all that `mmap` offers for it.
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(step)), 0, step.nbytes)
            time.sleep(time.perf_counter() - began)
