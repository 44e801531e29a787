"""Reading a checkpoint back. No byte is handed out before its digest has been checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from ckpt_tasks.checkpointer.memory import fresh_memory, memory_for
from ckpt_tasks.checkpointer.stored import Image, Stored, joined_rows
from ckpt_tasks.checkpointer.windows import (
    PARALLEL_WINDOWS,
    Window,
    WindowReader,
    check_header,
    check_size,
    chunks_of,
    copy_bytes,
    missing,
    windows,
)
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    UnsupportedFormatError,
)
from ckpt_tasks.format.codec import decode, index_digest
from ckpt_tasks.format.digest import CHUNK_BYTES
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    MAX_COMMIT_BYTES,
    CommitRecord,
    FileEntry,
    Index,
    IndexRef,
    RowBlocks,
    RunRecord,
    TensorEntry,
)
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = [
    "LoadedCheckpoint",
    "check_files",
    "load_checkpoint",
    "load_tensors",
    "positions_of",
    "read_commit",
    "read_index",
    "read_index_bytes",
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
        Bytes of the tensors that were asked for, by position; writable, and theirs alone. Those of
        one that was saved in blocks of rows are together, at the position of the first.
    """

    record: CommitRecord
    index: Index
    tensors: dict[int, memoryview]

    @property
    def trees(self) -> dict[str, Any]:
        return self.index.items

    def image(self, position: int) -> Image:
        """What the trees refer to by `position`.

        Raises `CorruptCheckpointError` where there is none.
        """
        if position not in self.tensors:
            raise CorruptCheckpointError(
                f"{self.record.id} refers to tensor {position}, and has none"
            )
        entry = self.index.tensors[position]
        shape = tuple(entry.shape)
        for tensor in self.index.row_blocks or []:
            if tensor.position == position:
                blocks = [(Stored(0, each), self.index.tensors[each]) for each in tensor.positions]
                shape = joined_rows(tensor.key, blocks).shape
        return Image(self.tensors[position], entry.dtype, shape)


def read_commit(
    store: Store, layout: RunLayout, checkpoint: CheckpointId, *, run: RunRecord | None = None
) -> CommitRecord:
    """A checkpoint's commit record.

    Parameters
    ----------
    run
        The run's identity: checked when given.

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
    if record.id != str(checkpoint):
        raise CorruptCheckpointError(f"{path} holds {record.id} and not {checkpoint}")
    if run is not None and not run.owns(record.uid, checkpoint.attempt):
        raise CorruptCheckpointError(
            f"{path} holds {record.id} of run uid {record.uid}, not of {run.uid}"
        )
    return record


def read_index(store: Store, layout: RunLayout, ref: IndexRef) -> Index:
    """One rank's index, verified against the commit record that names it.

    Raises `CorruptCheckpointError` when it is missing or its bytes are not the committed ones.
    """
    path = layout.in_run(ref.path)
    index = decode(read_index_bytes(store, layout, ref), Index, path=path)
    if index.rank != ref.rank:
        raise CorruptCheckpointError(f"{path} is rank {index.rank}'s index, not {ref.rank}'s")
    return index


def read_index_bytes(store: Store, layout: RunLayout, ref: IndexRef) -> bytes:
    """The bytes of an index, verified against the commit record that names it. Raises as
    `read_index`.
    """
    path = layout.in_run(ref.path)
    data = _read_exactly(store, path, ref.size)
    if index_digest(data) != ref.digest:
        raise CorruptCheckpointError(
            f"{path} is damaged: digest {index_digest(data)}, committed {ref.digest}"
        )
    return data


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
    if record.world_size != 1:
        raise UnsupportedFormatError(
            f"{record.id} of run {layout.run!r} was saved by {record.world_size} ranks, which "
            "`open_sharded` reads"
        )
    index = read_index(store, layout, record.indexes[0])
    wanted = None
    if names is not None:
        wanted = positions_of(tree for name, tree in index.items.items() if name in names)
    return LoadedCheckpoint(record, index, load_tensors(store, layout, index, wanted))


def load_tensors(
    store: Store, layout: RunLayout, index: Index, wanted: Collection[int] | None
) -> dict[int, memoryview]:
    """Bytes of one rank's tensors, verified, by the position by which trees refer to them.

    Blocks of rows come together, as one tensor, at the position of the first. Beside the tensors'
    own, memory is taken for a few windows of chunks.

    Parameters
    ----------
    wanted
        Which; default: all, and then every file is looked at. Only their bytes are read.

    Raises as `load_checkpoint`.
    """
    split = [each for each in index.row_blocks or [] if wanted is None or each.position in wanted]
    blocks = {position for tensor in split for position in tensor.positions}
    wanted = None if wanted is None else blocks.union(wanted)
    files = [
        (layout.in_run(file.path), file, chosen)
        for file, members in _by_file(index)
        if (chosen := {p: t for p, t in members.items() if wanted is None or p in wanted})
        or wanted is None
    ]
    reader = WindowReader(store)
    tensors: dict[int, memoryview] = {}
    with ThreadPoolExecutor(PARALLEL_WINDOWS, thread_name_prefix="load") as pool:

        def check(task: tuple[str, FileEntry, Mapping[int, TensorEntry]]) -> None:
            path, file, members = task
            check_header(store, path, file, members.values())

        def load(task: tuple[str, Window]) -> None:
            for chunk, data in reader.read(*task):
                start = chunk.number * CHUNK_BYTES
                copy_bytes(tensors[chunk.position][start : start + data.nbytes], data)

        # All headers first: memory is taken for sizes that are true.
        _exhaust(pool.map(check, files))
        for _, _, members in files:
            sizes = {p: tensor.size for p, tensor in members.items() if p not in blocks}
            tensors.update(memory_for(sizes))
        joined = {each.position: _memory_for_rows(each, index, tensors) for each in split}
        tasks = [(path, window) for path, _, members in files for window in _windows(members)]
        _exhaust(pool.map(load, tasks))
    alone = {position: data for position, data in tensors.items() if position not in blocks}
    return {**alone, **joined}


def _memory_for_rows(tensor: RowBlocks, index: Index, places: dict[int, memoryview]) -> memoryview:
    """Memory for a tensor of which each block's `places` lies behind the one before."""
    memory = fresh_memory(sum(index.tensors[position].size for position in tensor.positions))
    start = 0
    for position in tensor.positions:
        stop = start + index.tensors[position].size
        places[position] = memory[start:stop]
        start = stop
    return memory


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
    reader = WindowReader(store)
    with ThreadPoolExecutor(PARALLEL_WINDOWS, thread_name_prefix="verify") as pool:
        for file, members in _by_file(index):
            path = layout.in_run(file.path)
            check_header(store, path, file, members.values())
            _exhaust(pool.map(partial(reader.read, path), _windows(members)))
            yield file


def _exhaust(iterator: Iterator[object]) -> None:
    deque(iterator, maxlen=0)


def _windows(members: Mapping[int, TensorEntry]) -> Iterator[Window]:
    return windows(chunk for p, tensor in members.items() for chunk in chunks_of(p, tensor))


def _by_file(index: Index) -> Iterator[tuple[FileEntry, dict[int, TensorEntry]]]:
    """Each file with its tensors, by their position in the index."""
    members: list[dict[int, TensorEntry]] = [{} for _ in index.files]
    for position, tensor in enumerate(index.tensors):
        members[tensor.file][position] = tensor
    yield from zip(index.files, members, strict=True)


def _read_exactly(store: Store, path: str, size: int) -> bytes:
    check_size(store, path, size)
    try:
        data = store.read(path, limit=size)
    except ObjectNotFoundError as error:
        raise missing(store, path) from error
    if len(data) != size:
        raise CorruptCheckpointError(f"{path} gave {len(data)} bytes, committed were {size}")
    return data
