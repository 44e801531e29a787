"""Writing one rank's part of a checkpoint: tensor files, then the index that names them.

Nothing written here is a checkpoint. Until a commit record names the index, a crash leaves only
bytes that nobody refers to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.codec import encode, index_digest
from ckpt_tasks.format.digest import chunk_spans, digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import FileEntry, Index, IndexRef, TensorEntry
from ckpt_tasks.format.safetensors import TensorSpec, build_header
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Number

__all__ = ["StagedState", "StagedTensor", "WrittenRank", "write_rank"]

_INLINE_DIGEST_BYTES = 256 * 1024  # below this, handing the work to a thread costs more


class StagedTensor(Protocol):
    """A tensor ready to be written; see `ckpt_tasks.state`."""

    @property
    def item(self) -> str:
        """The tracked name it belongs to."""

    @property
    def key(self) -> str:
        """Its name in that item's file."""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""

    def buffer(self) -> memoryview:
        """Its bytes in row-major order."""


class StagedState(Protocol):
    """One rank's state ready to be written: trees, and the tensors they refer to by position."""

    @property
    def trees(self) -> Mapping[str, Any]:
        """Tracked name to JSON-ready tree."""

    @property
    def tensors(self) -> Sequence[StagedTensor]:
        """In the order of their positions."""


class WrittenRank(msgspec.Struct, frozen=True):
    """What `write_rank` leaves in the store: the reference for the commit record, the index
    itself, and the bytes of all files together.
    """

    ref: IndexRef
    index: Index
    size: int


def write_rank(
    store: Store,
    layout: RunLayout,
    state: StagedState,
    *,
    write_id: str,
    rank: int = 0,
    world_size: int = 1,
    metrics: Sequence[tuple[str, Number, int, int]] = (),
) -> WrittenRank:
    """Write one rank's files and index under `write_id`, durably.

    Parameters
    ----------
    metrics
        Rows logged since the previous checkpoint of the attempt.

    Raises
    ------
    StoreError
        Storage failed. What was written is removed where the store still answers.
    """
    written: list[str] = []
    try:
        return _write_rank(store, layout, state, write_id, rank, world_size, metrics, written)
    except BaseException:
        for path in written:
            with contextlib.suppress(StoreError):
                store.delete(path)
        raise


def _write_rank(
    store: Store,
    layout: RunLayout,
    state: StagedState,
    write_id: str,
    rank: int,
    world_size: int,
    metrics: Sequence[tuple[str, Number, int, int]],
    written: list[str],
) -> WrittenRank:
    folder = layout.write_folder_in_run(write_id)
    files: list[FileEntry] = []
    entries: dict[int, TensorEntry] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        for item, positions in _by_item(state.tensors).items():
            path = f"{folder}/{layout.tensors_name(item, rank)}"
            written.append(layout.in_run(path))
            tensors = [state.tensors[position] for position in positions]
            file, found = _write_file(store, layout, path, tensors, len(files), item, pool)
            files.append(file)
            entries.update(zip(positions, found, strict=True))
    index = Index(
        rank=rank,
        world_size=world_size,
        files=files,
        tensors=[entries[position] for position in range(len(state.tensors))],
        items=dict(state.trees),
        metrics=list(metrics),
    )
    data = encode(index)
    path = f"{folder}/{layout.index_name(rank)}"
    written.append(layout.in_run(path))
    store.write(layout.in_run(path), [data], len(data))
    ref = IndexRef(rank=rank, path=path, size=len(data), digest=index_digest(data))
    return WrittenRank(ref, index, len(data) + sum(file.size for file in files))


def _by_item(tensors: Sequence[StagedTensor]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault(tensor.item, []).append(position)
    return positions


def _write_file(
    store: Store,
    layout: RunLayout,
    path: str,
    tensors: Sequence[StagedTensor],
    number: int,
    item: str,
    pool: ThreadPoolExecutor,
) -> tuple[FileEntry, list[TensorEntry]]:
    """Write one safetensors file; digests are computed beside the writing."""
    specs = [TensorSpec(t.key, t.dtype, tuple(t.shape)) for t in tensors]
    header = build_header(specs, {"format": "pt", "ckpt_tasks": item})
    buffers = [tensor.buffer() for tensor in tensors]
    chunks = [[_digest(pool, chunk) for chunk in _chunks(buffer)] for buffer in buffers]
    size = len(header) + sum(spec.size for spec in specs)
    store.write(layout.in_run(path), [header, *buffers], size)
    file = FileEntry(path=path, size=size, header_size=len(header), header_digest=digest(header))
    entries = []
    offset = len(header)
    for spec, digests in zip(specs, chunks, strict=True):
        entries.append(
            TensorEntry(
                file=number,
                key=spec.key,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                size=spec.size,
                chunks=[d if isinstance(d, str) else d.result() for d in digests],
            )
        )
        offset += spec.size
    return file, entries


def _chunks(buffer: memoryview) -> Iterator[memoryview]:
    for start, stop in chunk_spans(buffer.nbytes):
        yield buffer[start:stop]


def _digest(pool: ThreadPoolExecutor, chunk: memoryview) -> str | Future[str]:
    if chunk.nbytes < _INLINE_DIGEST_BYTES:
        return digest(chunk)
    return pool.submit(digest, chunk)
