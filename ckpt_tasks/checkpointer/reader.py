"""Reading a checkpoint back. No byte is handed out before its digest has been checked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    UnsupportedFormatError,
)
from ckpt_tasks.format.codec import decode, index_digest
from ckpt_tasks.format.digest import chunk_spans, digest
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
    "iter_files",
    "load_checkpoint",
    "read_commit",
    "read_index",
]


class LoadedCheckpoint(msgspec.Struct, frozen=True):
    """A verified checkpoint in host memory.

    Parameters
    ----------
    record
        Its commit record.
    index
        This rank's index.
    tensors
        Bytes of each tensor of `index.tensors`, in that order.
    """

    record: CommitRecord
    index: Index
    tensors: list[memoryview]

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


def load_checkpoint(store: Store, layout: RunLayout, record: CommitRecord) -> LoadedCheckpoint:
    """Read and verify the whole checkpoint into host memory.

    Raises
    ------
    CorruptCheckpointError
        Any byte, header or file is not what was committed.
    UnsupportedFormatError
        It was saved by several ranks.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    if record.world_size != 1:
        raise UnsupportedFormatError(
            f"{record.id} of run {layout.run!r} was saved by {record.world_size} ranks; this "
            "version restores checkpoints of one"
        )
    index = read_index(store, layout, record.indexes[0])
    tensors: list[memoryview | None] = [None] * len(index.tensors)
    for _, found in iter_files(store, layout, index):
        for position, data in found.items():
            tensors[position] = data
    return LoadedCheckpoint(record, index, [t for t in tensors if t is not None])


def iter_files(
    store: Store, layout: RunLayout, index: Index
) -> Iterator[tuple[FileEntry, dict[int, memoryview]]]:
    """Read and verify one file after the other: its entry, and its tensors' bytes by position."""
    members: dict[int, dict[int, TensorEntry]] = {n: {} for n in range(len(index.files))}
    for position, tensor in enumerate(index.tensors):
        members[tensor.file][position] = tensor
    with ThreadPoolExecutor(2, thread_name_prefix="digest") as pool:
        for number, file in enumerate(index.files):
            path = layout.in_run(file.path)
            data = memoryview(_read_exactly(store, path, file.size))
            _check_header(path, file, data, members[number])
            jobs = [
                (tensor, pool.submit(_digests, data[tensor.offset : tensor.offset + tensor.size]))
                for tensor in members[number].values()
            ]
            for tensor, job in jobs:
                _check_chunks(path, tensor, job.result())
            yield (
                file,
                {
                    position: data[tensor.offset : tensor.offset + tensor.size]
                    for position, tensor in members[number].items()
                },
            )


def _read_exactly(store: Store, path: str, size: int) -> bytes:
    try:
        found = store.size(path)
        if found != size:
            raise CorruptCheckpointError(f"{path} has {found} bytes, committed were {size}")
        data = store.read(path, limit=size)
    except ObjectNotFoundError as error:
        raise CorruptCheckpointError(f"{path} is missing from {store.url}") from error
    if len(data) != size:
        raise CorruptCheckpointError(f"{path} gave {len(data)} bytes, committed were {size}")
    return data


def _check_header(
    path: str, file: FileEntry, data: memoryview, tensors: dict[int, TensorEntry]
) -> None:
    header = bytes(data[: file.header_size])
    if digest(header) != file.header_digest:
        raise CorruptCheckpointError(f"{path} is damaged: its header's digest does not match")
    try:
        specs = parse_header(header)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error
    for tensor in tensors.values():
        spec, start = specs.get(tensor.key, (None, 0))
        entry = (tensor.dtype, tuple(tensor.shape), tensor.offset, tensor.size)
        if spec is None or entry != (spec.dtype, spec.shape, file.header_size + start, spec.size):
            raise CorruptCheckpointError(f"{path}: header and index differ on {tensor.key!r}")


def _digests(data: memoryview) -> list[str]:
    return [digest(data[start:stop]) for start, stop in chunk_spans(data.nbytes)]


def _check_chunks(path: str, tensor: TensorEntry, found: list[str]) -> None:
    for number, (actual, committed) in enumerate(zip(found, tensor.chunks, strict=True)):
        if actual != committed:
            raise CorruptCheckpointError(
                f"{path} is damaged: chunk {number} of tensor {tensor.key!r} has digest "
                f"{actual}, committed was {committed}"
            )
