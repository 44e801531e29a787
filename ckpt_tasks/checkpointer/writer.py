"""Writing one rank's part of a checkpoint: tensor files, then the index that names them.

Nothing written here is a checkpoint. Until a commit record names the index, a crash leaves only
bytes that nobody refers to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from msgspec import UNSET

from ckpt_tasks.checkpointer.image import FileImage, Image
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.codec import encode, index_digest
from ckpt_tasks.format.digest import chunk_spans, digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import FileEntry, Index, IndexRef, SharedTensor, TensorEntry
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Number

__all__ = ["WrittenRank", "write_rank"]

_ALONE_BYTES = 256 * 1024  # below it a thread costs more than it saves


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
    image: Image,
    memory: memoryview,
    trees: Mapping[str, Any],
    *,
    write_id: str,
    rank: int = 0,
    world_size: int = 1,
    metrics: Sequence[tuple[str, Number, int, int]] = (),
    shared: Sequence[SharedTensor] = (),
    nonfinite: Sequence[str] = (),
) -> WrittenRank:
    """Write one rank's files and index under `write_id`, durably.

    Parameters
    ----------
    image, memory
        The files, and the bytes that they are to hold.
    trees
        Tracked name to JSON-ready tree.
    metrics
        Rows logged since the previous checkpoint of the attempt.
    shared, nonfinite
        As `Index` keeps them, where several ranks save.

    Raises
    ------
    StoreError
        Storage failed. What was written is removed where the store still answers.
    """
    written: list[str] = []
    try:
        files, tensors = _write_files(store, layout, image, memory, write_id, rank, written)
        index = Index(
            rank=rank,
            world_size=world_size,
            files=files,
            tensors=tensors,
            items=dict(trees),
            metrics=list(metrics),
            shared=list(shared) or UNSET,
            nonfinite=(list(nonfinite)[:20] or UNSET) if world_size > 1 else UNSET,
        )
        data = encode(index)
        path = f"{layout.write_folder_in_run(write_id)}/{layout.index_name(rank)}"
        written.append(layout.in_run(path))
        _write_index(store, layout.in_run(path), data, world_size)
    except BaseException:
        for path in written:
            with contextlib.suppress(StoreError):
                store.delete(path)
        raise
    ref = IndexRef(rank=rank, path=path, size=len(data), digest=index_digest(data))
    return WrittenRank(ref, index, len(data) + sum(file.size for file in files))


def _write_index(store: Store, path: str, data: bytes, world_size: int) -> None:
    if world_size == 1:
        store.write(path, [data], len(data))
    elif not create_once(store, path, data):
        # Another rank looks for it: it must not be there before it is whole and durable.
        raise StoreError(f"{path} was there already; another process writes as the same rank")


def _write_files(
    store: Store,
    layout: RunLayout,
    image: Image,
    memory: memoryview,
    write_id: str,
    rank: int,
    written: list[str],
) -> tuple[list[FileEntry], list[TensorEntry]]:
    folder = layout.write_folder_in_run(write_id)
    entries: list[FileEntry] = []
    chunks: dict[int, list[str]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        for file in image.files:
            path = f"{folder}/{layout.tensors_name(file.item, rank)}"
            written.append(layout.in_run(path))
            content = memory[file.start : file.start + file.size]
            if file.size < _ALONE_BYTES:
                chunks.update(_digests(image, memory, file))
                store.write(layout.in_run(path), [content], file.size)
            else:
                # Digests need the processor while the writing waits for the device.
                digests = pool.submit(_digests, image, memory, file)
                store.write(layout.in_run(path), [content], file.size)
                chunks.update(digests.result())
            entries.append(_file_entry(path, file))
    return entries, _tensor_entries(image, chunks)


def _file_entry(path: str, file: FileImage) -> FileEntry:
    return FileEntry(
        path=path,
        size=file.size,
        header_size=len(file.header),
        header_digest=digest(file.header),
    )


def _tensor_entries(image: Image, chunks: Mapping[int, list[str]]) -> list[TensorEntry]:
    number_of = {p: number for number, file in enumerate(image.files) for p in file.positions}
    return [
        TensorEntry(
            file=number_of[position],
            key=spec.key,
            dtype=spec.dtype,
            shape=list(spec.shape),
            offset=image.offsets[position] - image.files[number_of[position]].start,
            size=spec.size,
            chunks=chunks[position],
        )
        for position, spec in enumerate(image.specs)
    ]


def _digests(image: Image, memory: memoryview, file: FileImage) -> dict[int, list[str]]:
    """Of each chunk of the file's tensors, by position."""
    found: dict[int, list[str]] = {}
    for position in file.positions:
        start = image.offsets[position]
        spans = chunk_spans(image.specs[position].size)
        found[position] = [digest(memory[start + i : start + j]) for i, j in spans]
    return found
