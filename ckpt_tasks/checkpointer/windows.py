"""Reading a file of tensors piece by piece: what is handed out has been checked before."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from ckpt_tasks.checkpointer.memory import fresh_memory
from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.format.digest import CHUNK_BYTES, digest
from ckpt_tasks.format.records import FileEntry, TensorEntry
from ckpt_tasks.format.safetensors import parse_header
from ckpt_tasks.store.base import Store

__all__ = [
    "PARALLEL_WINDOWS",
    "WINDOW_BYTES",
    "Chunk",
    "Window",
    "WindowReader",
    "check_chunk",
    "check_header",
    "check_size",
    "chunks_of",
    "copy_bytes",
    "for_each",
    "missing",
    "windows",
]

WINDOW_BYTES = 2 * CHUNK_BYTES
PARALLEL_WINDOWS = 4
"""With `WINDOW_BYTES`, what reading a checkpoint of any size takes beside its tensors' memory."""

_TASKS = 8 * PARALLEL_WINDOWS  # that wait or are done, so that no thread ever waits for one
_PAGE = 4096
_GAP_BYTES = 1024 * 1024
"""What is read for nothing rather than asked for around."""


class Chunk(NamedTuple):
    """One digested chunk of a tensor.

    Parameters
    ----------
    position
        By which the reader knows the tensor.
    number
        Which of the tensor's chunks.
    start, stop
        Its bytes, from the file's first one.
    """

    position: int
    tensor: TensorEntry
    number: int
    start: int
    stop: int


Window = list[Chunk]
T = TypeVar("T")


def for_each(tasks: Iterable[T], call: Callable[[T], object]) -> None:
    """Call with each of `tasks`, in several threads; raises what a call does, the earliest's first.

    Only a few of them are taken at a time: those of a checkpoint that claims to have terabytes are
    not all made, nor begun after the first that fails.
    """

    def do(task: T) -> None:
        call(task)  # what it returns may hold a window's memory, and its future waits here

    begun: deque[Future[None]] = deque()
    with ThreadPoolExecutor(PARALLEL_WINDOWS, thread_name_prefix="load") as pool:
        try:
            for task in tasks:
                if len(begun) == _TASKS:
                    begun.popleft().result()
                begun.append(pool.submit(do, task))
            while begun:
                begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
            begun.clear()  # else an error would hold, by way of this, the window that it is about


def windows(chunks: Iterable[Chunk]) -> Iterator[Window]:
    """Chunks of a file in its order, those that lie together in one window of bytes.

    Small tensors are read together: a request for each would take an object store minutes. Two
    tensors may name the same bytes.
    """
    window: Window = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.start, chunk.stop)):
        if window and (
            chunk.stop - window[0].start > WINDOW_BYTES
            or chunk.start - window[-1].stop > _GAP_BYTES
        ):
            yield window
            window = []
        window.append(chunk)
    if window:
        yield window


def chunks_of(
    position: int, tensor: TensorEntry, numbers: Iterable[int] | None = None
) -> Iterator[Chunk]:
    """All chunks of a tensor, or those of these `numbers`."""
    for number in range(-(-tensor.size // CHUNK_BYTES)) if numbers is None else numbers:
        start = number * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, tensor.size)
        yield Chunk(position, tensor, number, tensor.offset + start, tensor.offset + stop)


class WindowReader:
    """Reads windows of a store's files, from several threads at once.

    Each thread reads into memory of its own, which its next window overwrites.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of_thread = threading.local()

    def read(self, path: str, window: Window) -> list[tuple[Chunk, memoryview]]:
        """The chunks of a window with their bytes, once all of them have been found right.

        The bytes are valid until this thread reads again.

        Raises
        ------
        CorruptCheckpointError
            A chunk is not what was committed, or the file is missing or ends early.
        StoreError
            Storage failed.
        """
        start, stop = window[0].start, max(chunk.stop for chunk in window)
        data = self._read(path, start, stop)
        pieces = [data[chunk.start - start : chunk.stop - start] for chunk in window]
        for chunk, piece in zip(window, pieces, strict=True):
            check_chunk(path, chunk, piece)
        return list(zip(window, pieces, strict=True))

    def _read(self, path: str, start: int, stop: int) -> memoryview:
        first = start - start % _PAGE
        buffer = self._buffer(-(-stop // _PAGE) * _PAGE - first)
        try:
            self._store.read_into(path, first, stop, buffer)
        except ObjectNotFoundError as error:
            raise missing(self._store, path) from error
        return buffer[start - first : stop - first]

    def _buffer(self, size: int) -> memoryview:
        memory: memoryview | None = getattr(self._of_thread, "memory", None)
        if memory is None or memory.nbytes < size:
            memory = self._of_thread.memory = fresh_memory(size)
        return memory[:size]


def check_chunk(path: str, chunk: Chunk, data: memoryview) -> None:
    """Raise `CorruptCheckpointError` unless `data` is what was committed."""
    actual, committed = digest(data), chunk.tensor.chunks[chunk.number]
    if actual != committed:
        raise CorruptCheckpointError(
            f"{path} is damaged: chunk {chunk.number} of tensor {chunk.tensor.key!r} has digest "
            f"{actual}, committed was {committed}"
        )


def check_size(store: Store, path: str, size: int) -> None:
    """Raise `CorruptCheckpointError` unless the object has this size; before memory is taken."""
    try:
        found = store.size(path)
    except ObjectNotFoundError as error:
        raise missing(store, path) from error
    if found != size:
        raise CorruptCheckpointError(f"{path} has {found} bytes, committed were {size}")


def check_header(store: Store, path: str, file: FileEntry, tensors: Iterable[TensorEntry]) -> None:
    """Raise `CorruptCheckpointError` unless size and header of a file are what was committed, and
    the header says of `tensors` what their entries say.

    It may hold others, which another index refers to.
    """
    check_size(store, path, file.size)
    try:
        header = store.read_range(path, 0, file.header_size)
    except ObjectNotFoundError as error:
        raise missing(store, path) from error
    if digest(header) != file.header_digest:
        raise CorruptCheckpointError(f"{path} is damaged: its header's digest does not match")
    try:
        specs = parse_header(header)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error
    for tensor in tensors:
        spec, start = specs.get(tensor.key, (None, 0))
        entry = (tensor.dtype, tuple(tensor.shape), tensor.offset, tensor.size)
        if spec is None or entry != (spec.dtype, spec.shape, file.header_size + start, spec.size):
            raise CorruptCheckpointError(f"{path}: header and index differ on {tensor.key!r}")


def missing(store: Store, path: str) -> CorruptCheckpointError:
    """The error that says so."""
    return CorruptCheckpointError(f"{path} is missing from {store.url}")


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy all of `source` without the interpreter's lock, unlike an assignment."""
    to, of = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (target, source))
    ctypes.memmove(to, of, source.nbytes)
