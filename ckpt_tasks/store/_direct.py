"""Large files past the page cache: a fraction of the CPU time, and nothing of it evicts what
others have cached.

Sources: open(2) on ``O_DIRECT``, fallocate(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["ALIGNMENT", "direct_source", "read_direct", "write_direct"]

ALIGNMENT = 4096
"""Of addresses, offsets and lengths: no device asks for more than a page."""

_LEAST_BYTES = 1024 * 1024  # below it, preparing the file costs more than is gained
_BLOCK_BYTES = 8 * 1024 * 1024
_GATHERED_BYTES = 1024 * 1024  # the first touch of a block takes longer than copying into it
_THREADS = 2
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class _Whole:
    """Memory that is written from where it lies."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def block(self, start: int, stop: int, into: memoryview | None) -> memoryview:
        return self._view[start:stop]


class _Gathered:
    """Parts in several places, brought together block by block, in order."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._left = deque(memoryview(part).cast("B") for part in parts)

    def block(self, start: int, stop: int, into: memoryview | None) -> memoryview:
        target = memoryview(bytearray(stop - start)) if into is None else into[: stop - start]
        done = 0
        while done < target.nbytes:
            part = self._left.popleft()
            taken = part[: target.nbytes - done]
            target[done : done + taken.nbytes] = taken
            done += taken.nbytes
            if taken.nbytes < part.nbytes:
                self._left.appendleft(part[taken.nbytes :])
        return target


_Source = _Whole | _Gathered


def direct_source(parts: Iterable[Any], size: int) -> _Source | None:
    """What `write_direct` takes, where writing `parts` past the page cache is worth it.

    Nothing is taken from an iterator.
    """
    if not isinstance(parts, list) or size < _LEAST_BYTES or not hasattr(os, "O_DIRECT"):
        return None
    if sum(memoryview(part).nbytes for part in parts) != size:
        return None  # the plain way finds out, and says so
    if len(parts) == 1 and _is_aligned(view := memoryview(parts[0]).cast("B")):
        return _Whole(view)
    return _Gathered(parts)


def _is_aligned(view: memoryview) -> bool:
    if view.readonly:
        return False  # its address is not told
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT == 0


def write_direct(descriptor: int, source: _Source, size: int) -> bool:
    """Write `size` bytes into a new file; they are on the device when this returns.

    Its size and blocks are the file's metadata, which still need an fsync.

    Returns
    -------
    bool
        False: the file system cannot do this, and the file is empty.

    Raises
    ------
    OSError
        It could not be written.
    """
    body = size - size % ALIGNMENT
    try:
        _set_direct(descriptor, True)
        _allocate(descriptor, size)
        _write_blocks(descriptor, source, body)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, 0)
        return False
    finally:
        _set_direct(descriptor, False)
    _write(descriptor, source.block(body, size, None), body)
    return True


def read_direct(descriptor: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file; past the page cache where memory, place and file system allow.

    Returns
    -------
    int
        How many bytes; fewer than `buffer` takes at the file's end.

    Raises
    ------
    OSError
        It could not be read.
    """
    done = _read_pages(descriptor, start, buffer) if _could_be_direct(start, buffer) else 0
    while done < buffer.nbytes:
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def _could_be_direct(start: int, buffer: memoryview) -> bool:
    return (
        hasattr(os, "O_DIRECT")
        and buffer.nbytes >= _LEAST_BYTES
        and not (start % ALIGNMENT or buffer.nbytes % ALIGNMENT)
        and _is_aligned(buffer)
    )


def _read_pages(descriptor: int, start: int, buffer: memoryview) -> int:
    """Read past the page cache as far as that goes: not at all on some file systems, else to the
    file's end, or until a call ends off a page.
    """
    done = 0
    try:
        _set_direct(descriptor, True)
        while done < buffer.nbytes and done % ALIGNMENT == 0:
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        _set_direct(descriptor, False)
    return done


def _set_direct(descriptor: int, direct: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    flags = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the blocks: threads extend the file at several places at once.

    Not by ``posix_fallocate``, which writes zeros where the file system knows no better.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    failed = ctypes.get_errno()
    raise OSError(failed, os.strerror(failed))


def _write_blocks(descriptor: int, source: _Source, size: int) -> None:
    """By several threads; what has to be gathered, through a few blocks that are used again."""
    gathers = isinstance(source, _Gathered)
    step = _GATHERED_BYTES if gathers else _BLOCK_BYTES
    free = deque(_aligned_block() if gathers else None for _ in range(_THREADS + 1))
    writing: deque[tuple[Future[None], memoryview | None]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="write") as pool:
        for start in range(0, size, step):
            if not free:
                written, memory = writing.popleft()
                written.result()
                free.append(memory)
            memory = free.popleft()
            block = source.block(start, min(start + step, size), memory)
            writing.append((pool.submit(_write, descriptor, block, start), memory))
        for written, _ in writing:
            written.result()


def _aligned_block() -> memoryview:
    return memoryview(mmap.mmap(-1, _GATHERED_BYTES))


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view`; the system may take only part of it in one call."""
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
