"""Reading a checkpoint back. No byte is handed out before its digest has been checked."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import msgspec

from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    UnsupportedFormatError,
)
from ckpt_tasks.format.codec import decode, index_digest
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    MAX_COMMIT_BYTES,
    CommitRecord,
    FileEntry,
    Index,
    IndexRef,
    TensorEntry,
)
from ckpt_tasks.format.safetensors import parse_header
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = [
    "LoadedCheckpoint",
    "check_files",
    "check_restorable",
    "load_checkpoint",
    "load_tensors",
    "positions_of",
    "read_commit",
    "read_index",
]

_PAGE = 4096
_WINDOW_BYTES = 2 * CHUNK_BYTES
_PARALLEL_WINDOWS = 4
"""With `_WINDOW_BYTES`, what checking a checkpoint of any size holds in memory at once."""


class LoadedCheckpoint(msgspec.Struct, frozen=True):
    """A verified checkpoint in host memory.

    Parameters
    ----------
    record
        Its commit record.
    index
        This rank's index.
    tensors
        Bytes of the tensors of `index.tensors` that were asked for, by position; writable, and
        theirs alone.
    """

    record: CommitRecord
    index: Index
    tensors: dict[int, memoryview]

    @property
    def trees(self) -> dict[str, Any]:
        return self.index.items


def read_commit(
    store: Store, layout: RunLayout, checkpoint: CheckpointId, *, uid: str | None = None
) -> CommitRecord:
    """A checkpoint's commit record.

    Parameters
    ----------
    uid
        The run's identity, checked when given.

    Raises
    ------
    CheckpointNotFoundError
        There is no such checkpoint.
    CorruptCheckpointError
        The record is damaged, or belongs to another run or checkpoint.
    UnsupportedFormatError
        It was written by a later version.
    """
    path = layout.commit(checkpoint)
    try:
        data = store.read(path, limit=MAX_COMMIT_BYTES)
    except ObjectNotFoundError as error:
        raise CheckpointNotFoundError(
            f"run {layout.run!r} has no checkpoint {checkpoint} in {store.url}"
        ) from error
    record = decode(data, CommitRecord, path=path)
    if record.id != str(checkpoint) or (uid is not None and record.uid != uid):
        raise CorruptCheckpointError(
            f"{path} holds {record.id} of run uid {record.uid}, not {checkpoint} of {uid}"
        )
    return record


def read_index(store: Store, layout: RunLayout, ref: IndexRef) -> Index:
    """One rank's index, verified against the commit record that names it.

    Raises `CorruptCheckpointError` when it is missing or its bytes are not the committed ones.
    """
    path = layout.in_run(ref.path)
    data = _read_exactly(store, path, ref.size)
    if index_digest(data) != ref.digest:
        raise CorruptCheckpointError(
            f"{path} is damaged: digest {index_digest(data)}, committed {ref.digest}"
        )
    index = decode(data, Index, path=path)
    if index.rank != ref.rank:
        raise CorruptCheckpointError(f"{path} is rank {index.rank}'s index, not {ref.rank}'s")
    return index


def load_checkpoint(
    store: Store,
    layout: RunLayout,
    record: CommitRecord,
    *,
    names: Collection[str] | None = None,
) -> LoadedCheckpoint:
    """Read and verify a checkpoint into host memory.

    Parameters
    ----------
    names
        Tracked names whose tensors are wanted; default: all. Only their bytes are read.

    Raises
    ------
    CorruptCheckpointError
        Any byte, header or file is not what was committed.
    UnsupportedFormatError
        It was saved by several ranks.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    check_restorable(layout, record)
    index = read_index(store, layout, record.indexes[0])
    wanted = (
        None
        if names is None
        else positions_of(tree for name, tree in index.items.items() if name in names)
    )
    return LoadedCheckpoint(record, index, load_tensors(store, layout, index, wanted))


def load_tensors(
    store: Store, layout: RunLayout, index: Index, wanted: Collection[int] | None
) -> dict[int, memoryview]:
    """Bytes of one rank's tensors, verified, by their number in `index.tensors`.

    Parameters
    ----------
    wanted
        Which; default: all, and then every file is looked at. Only their bytes are read.

    Raises as `load_checkpoint`.
    """
    tensors: dict[int, memoryview] = {}
    with ThreadPoolExecutor(_PARALLEL_WINDOWS, thread_name_prefix="load") as pool:
        for file, members in _by_file(index):
            chosen = {p: t for p, t in members.items() if wanted is None or p in wanted}
            if chosen or wanted is None:
                path = layout.in_run(file.path)
                tensors.update(_load_file(store, path, file, chosen, pool))
    return tensors


def positions_of(trees: Iterable[Any], *, skip: str | None = None) -> set[int]:
    """Positions of the tensors that trees refer to: one that several share lies with the first.

    Parameters
    ----------
    skip
        Tag of leaves that are not looked into.
    """
    found: set[int] = set()
    pending: list[Any] = list(trees)
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict) and (skip is None or node.get("$") != skip):
            pending.extend(node.values())
            reference = node.get("v") if node.get("$") == "tensor" else None
            position = reference.get("index") if isinstance(reference, dict) else reference
            if isinstance(position, int):
                found.add(position)
    return found


def check_restorable(layout: RunLayout, record: CommitRecord) -> None:
    """Raise `UnsupportedFormatError` for a checkpoint that this version cannot load."""
    if record.world_size != 1:
        raise UnsupportedFormatError(
            f"{record.id} of run {layout.run!r} was saved by {record.world_size} ranks; this "
            "version restores checkpoints of one"
        )


def check_files(store: Store, layout: RunLayout, index: Index) -> Iterator[FileEntry]:
    """Read and verify one file after the other, keeping nothing: yields each that is whole.

    Memory is bounded by a few windows of chunks, however large a file or a tensor is.

    Raises
    ------
    CorruptCheckpointError
        Any byte, header or file is not what was committed.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    with ThreadPoolExecutor(_PARALLEL_WINDOWS, thread_name_prefix="verify") as pool:
        for file, members in _by_file(index):
            path = layout.in_run(file.path)
            _check_size(store, path, file.size)
            header = _read_span(store, path, 0, file.header_size)
            _check_header(path, file, memoryview(header), members.values())
            for _ in pool.map(partial(_check_window, store, path), _windows(members.values())):
                pass
            yield file


def _by_file(index: Index) -> Iterator[tuple[FileEntry, dict[int, TensorEntry]]]:
    """Each file with its tensors, by their position in the index."""
    members: list[dict[int, TensorEntry]] = [{} for _ in index.files]
    for position, tensor in enumerate(index.tensors):
        members[tensor.file][position] = tensor
    yield from zip(index.files, members, strict=True)


def _load_file(
    store: Store,
    path: str,
    file: FileEntry,
    members: dict[int, TensorEntry],
    pool: ThreadPoolExecutor,
) -> dict[int, memoryview]:
    """The bytes of a file's tensors, verified, by position."""
    _check_size(store, path, file.size)
    header = _read_pages(store, path, 0, file.header_size)
    _check_header(path, file, header, members.values())
    memory = memoryview(mmap.mmap(-1, file.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    windows = list(_windows(members.values()))
    load = partial(_load_window, store, path, memory)
    # A small file is read at once, without the threads' help.
    for _ in map(load, windows) if len(windows) == 1 else pool.map(load, windows):
        pass
    return {
        position: memory[tensor.offset : tensor.offset + tensor.size]
        for position, tensor in members.items()
    }


def _load_window(store: Store, path: str, memory: memoryview, window: _Window) -> None:
    """Read and check a window, then put it where it belongs: what is not verified never gets there.

    A direct read into memory that was never touched takes longer than the copy.
    """
    start, stop = window[0].start, max(chunk.stop for chunk in window)
    data = _read_pages(store, path, start, stop)
    for chunk in window:
        actual = digest(data[chunk.start - start : chunk.stop - start])
        _check_chunk(path, chunk.tensor, chunk.number, actual)
    _copy(memory[start:stop], data)


def _read_pages(store: Store, path: str, start: int, stop: int) -> memoryview:
    """Bytes of a file, in memory of this thread's that its next call uses again."""
    first = start - start % _PAGE
    buffer = _bounce(_paged(stop) - first)
    try:
        store.read_into(path, first, stop, buffer)
    except ObjectNotFoundError as error:
        raise _missing(store, path) from error
    return buffer[start - first : stop - first]


_of_thread = threading.local()


def _bounce(size: int) -> memoryview:
    memory: memoryview | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _of_thread.memory = memoryview(mmap.mmap(-1, max(size, _PAGE)))
    return memory[:size]


def _copy(target: memoryview, source: memoryview) -> None:
    """Without the interpreter's lock, unlike an assignment."""
    to, of = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (target, source))
    ctypes.memmove(to, of, source.nbytes)


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class _Chunk(NamedTuple):
    """One digested chunk; `start` and `stop` count from the file's first byte."""

    tensor: TensorEntry
    number: int
    start: int
    stop: int


_Window = list[_Chunk]


def _windows(tensors: Iterable[TensorEntry]) -> Iterator[_Window]:
    """Chunks in the order of the file, those that lie together in one window of bytes.

    Small tensors are read together: a request for each would take an object store minutes.
    """
    window: _Window = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        for number, (start, stop) in enumerate(chunk_spans(tensor.size)):
            chunk = _Chunk(tensor, number, tensor.offset + start, tensor.offset + stop)
            if window and chunk.stop - window[0].start > _WINDOW_BYTES:
                yield window
                window = []
            window.append(chunk)
    if window:
        yield window


def _check_window(store: Store, path: str, window: _Window) -> None:
    start, stop = window[0].start, max(chunk.stop for chunk in window)
    data = memoryview(_read_span(store, path, start, stop))
    for chunk in window:
        actual = digest(data[chunk.start - start : chunk.stop - start])
        _check_chunk(path, chunk.tensor, chunk.number, actual)


def _read_exactly(store: Store, path: str, size: int) -> bytes:
    _check_size(store, path, size)
    try:
        data = store.read(path, limit=size)
    except ObjectNotFoundError as error:
        raise _missing(store, path) from error
    if len(data) != size:
        raise CorruptCheckpointError(f"{path} gave {len(data)} bytes, committed were {size}")
    return data


def _read_span(store: Store, path: str, start: int, stop: int) -> bytes:
    try:
        return store.read_range(path, start, stop)
    except ObjectNotFoundError as error:
        raise _missing(store, path) from error


def _check_size(store: Store, path: str, size: int) -> None:
    """Before memory is taken for it."""
    try:
        found = store.size(path)
    except ObjectNotFoundError as error:
        raise _missing(store, path) from error
    if found != size:
        raise CorruptCheckpointError(f"{path} has {found} bytes, committed were {size}")


def _missing(store: Store, path: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is missing from {store.url}")


def _check_header(
    path: str, file: FileEntry, data: memoryview, tensors: Iterable[TensorEntry]
) -> None:
    header = bytes(data[: file.header_size])
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


def _check_chunk(path: str, tensor: TensorEntry, number: int, actual: str) -> None:
    if actual != tensor.chunks[number]:
        raise CorruptCheckpointError(
            f"{path} is damaged: chunk {number} of tensor {tensor.key!r} has digest {actual}, "
            f"committed was {tensor.chunks[number]}"
        )
