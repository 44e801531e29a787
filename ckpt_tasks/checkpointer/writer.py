"""Writing one rank's part of a checkpoint: tensor files, then the index that names them.

Nothing written here is a checkpoint. Until a commit record names the index, a crash leaves only
bytes that nobody refers to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from ckpt_tasks.checkpointer.earlier import Earlier, Held, probe_all
from ckpt_tasks.checkpointer.image import FileImage, Image, file_header
from ckpt_tasks.errors import ConfigError, StoreError
from ckpt_tasks.format.codec import encode, index_digest
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    MAX_INDEX_BYTES,
    FileEntry,
    Index,
    IndexRef,
    RowBlocks,
    SharedTensor,
    TensorEntry,
)
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Number

__all__ = ["WrittenRank", "remove_rank", "write_rank"]

_ALONE_BYTES = 256 * 1024  # below it a thread costs more than it saves
_DIGESTING = 2  # threads


class WrittenRank(msgspec.Struct, frozen=True):
    """What `write_rank` leaves in the store.

    Parameters
    ----------
    ref
        Names the index, for the commit record.
    index
        The index itself.
    size
        Bytes of the index and of all files that it names.
    written
        Bytes of these that were not there before.
    earlier
        For the next write, should this one be committed.
    """

    ref: IndexRef
    index: Index
    size: int
    written: int
    earlier: Earlier


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
    earlier: Earlier | None = None,
    shared: Sequence[SharedTensor] = (),
    nonfinite: Sequence[str] = (),
    row_blocks: Sequence[RowBlocks] = (),
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
    earlier
        What need not be written again; ``None`` where everything is to be.
    shared, nonfinite
        As `Index` keeps them, where several ranks save.
    row_blocks
        As `Index` keeps them.

    Raises
    ------
    ConfigError
        The index is larger than any may be. What was written is removed.
    StoreError
        Storage failed. What was written is removed where the store still answers, unless rank 0
        may find this rank's part whole.
    """
    writing = _Writing(store, layout, image, memory, f"{layout.write_folder_in_run(write_id)}/")

    def describe(files: list[FileEntry], tensors: list[TensorEntry]) -> _Described:
        index = Index(
            rank=rank,
            world_size=world_size,
            files=files,
            tensors=tensors,
            items=dict(trees),
            metrics=list(metrics),
            shared=list(shared) or UNSET,
            nonfinite=(list(nonfinite) or UNSET) if world_size > 1 else UNSET,
            row_blocks=list(row_blocks) or UNSET,
        )
        return index, _encoded(index)

    try:
        index, data = writing.write_files(rank, earlier, describe)
        path = writing.write_index(data, rank, world_size)
    except BaseException:
        writing.remove()
        raise
    ref = IndexRef(rank=rank, path=path, size=len(data), digest=index_digest(data))
    return WrittenRank(
        ref,
        index,
        len(data) + sum(file.size for file in index.files),
        writing.size,
        Earlier(index, writing.probes) if earlier is not None else Earlier(),
    )


def _encoded(index: Index) -> bytes:
    """An index that can be read again."""
    data = encode(index)
    if len(data) <= MAX_INDEX_BYTES:
        return data
    sizes = {name: len(msgspec.json.encode(tree)) for name, tree in index.items.items()}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    raise ConfigError(
        f"the index of a checkpoint takes {len(data)} bytes, more than {MAX_INDEX_BYTES}, for "
        f"{len(index.tensors)} tensors and all that is none; of the tracked names, {largest!r} "
        f"takes most, {sizes.get(largest, 0)} bytes: keep many numbers in a tensor"
    )


def remove_rank(store: Store, layout: RunLayout, write_id: str, written: WrittenRank) -> None:
    """Delete what `write_rank` wrote under `write_id`, as far as the store still answers.

    Only of a write that nobody may have committed.
    """
    folder = f"{layout.write_folder_in_run(write_id)}/"
    files = [file.path for file in written.index.files if file.path.startswith(folder)]
    _remove(store, [layout.in_run(path) for path in (written.ref.path, *files)])


def _remove(store: Store, paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(StoreError):
            store.delete(path)


_Described = tuple[Index, bytes]
"""An index, and as it is stored."""


class _NewFile(NamedTuple):
    """A file to be written: bytes-like parts, and which tensors they hold, in this order."""

    name: str
    entry: FileEntry
    parts: list[memoryview | bytes]
    positions: list[int]


class _Writing:
    """One write under way.

    Attributes
    ----------
    size
        Bytes written so far.
    probes
        Of each tensor, by name, where it was looked for earlier ones.
    """

    def __init__(
        self, store: Store, layout: RunLayout, image: Image, memory: memoryview, folder: str
    ) -> None:
        self._store = store
        self._layout = layout
        self._image = image
        self._memory = memory
        self._folder = folder
        self._begun: list[str] = []
        self.size = 0
        self.probes: dict[tuple[str, str], int] = {}

    def write_files(
        self,
        rank: int,
        earlier: Earlier | None,
        describe: Callable[[list[FileEntry], list[TensorEntry]], _Described],
    ) -> _Described:
        """Write the files.

        Parameters
        ----------
        describe
            Called with the files that hold the tensors, new ones first, and the tensors by
            position: meanwhile, or before where there is little to write. What it gives is
            returned.
        """
        with ThreadPoolExecutor(_DIGESTING, thread_name_prefix="digest") as pool:
            chunks: dict[int, list[str]] = {}
            held = self._find_held(earlier, chunks, pool, rank) if earlier is not None else {}
            files = list(self._new_files(held, rank))

            def description() -> _Described:
                missing = [p for file in files for p in file.positions if p not in chunks]
                chunks.update(self._digests(missing))
                return describe(*_entries(self._image, chunks, files, held))

            if sum(file.entry.size for file in files) < _ALONE_BYTES:
                result = description()
                self._write_all(files)
                return result
            # Digests need the processor while the writing waits for the device.
            described = pool.submit(description)
            self._write_all(files)
            return described.result()

    def write_object(self, name: str, parts: Iterable[Any], size: int) -> str:
        """Write a new object; returns its path in the run's folder."""
        path = self._folder + name
        self._begun.append(self._layout.in_run(path))
        self._store.write(self._layout.in_run(path), parts, size)
        self.size += size
        return path

    def write_index(self, data: bytes, rank: int, world_size: int) -> str:
        """Write the index, last of all; returns its path in the run's folder."""
        name = self._layout.index_name(rank)
        if world_size == 1:
            return self.write_object(name, [data], len(data))
        path = self._folder + name
        self._begun.append(self._layout.in_run(path))
        if rank:
            # From here on rank 0 may see it, and commit: also where no answer comes back, and
            # perhaps only later. What is not committed is found as a leftover.
            self._begun.clear()
        if not create_once(self._store, self._layout.in_run(path), data):
            # Another rank looks for it: it must not be there before it is whole and durable.
            raise StoreError(f"{path} was there already; another process writes as the same rank")
        self.size += len(data)
        return path

    def remove(self) -> None:
        """Delete what was begun, as far as the store still answers."""
        _remove(self._store, self._begun)

    def _find_held(
        self, earlier: Earlier, chunks: dict[int, list[str]], pool: ThreadPoolExecutor, rank: int
    ) -> dict[int, Held]:
        """Tensors that need not be written; digests that this takes are kept in `chunks`."""
        probes = probe_all(self._image, self._memory)
        self.probes = {self._image.name_of(p): probe for p, probe in probes.items()}
        sizes = {p: self._image.specs[p].size for p in earlier.candidates(self._image, probes)}
        if sum(sizes.values()) < _ALONE_BYTES:
            chunks.update(self._digests(sizes))
        else:
            # Dealt out in the order of their sizes, so that every thread gets as much.
            ordered = sorted(sizes, key=lambda position: sizes[position])
            shares = [ordered[first::_DIGESTING] for first in range(_DIGESTING)]
            for digests in pool.map(self._digests, shares):
                chunks.update(digests)
        return earlier.find(self._image, chunks, lambda file: self._name_of(file, rank))

    def _name_of(self, file: FileImage, rank: int) -> str:
        return self._layout.tensors_name(file.item, rank, rows=file.rows)

    def _new_files(self, held: Collection[int], rank: int) -> Iterator[_NewFile]:
        """Those of the image's files that have tensors which are not held, with these alone."""
        for file in self._image.files:
            positions = [p for p in file.positions if p not in held]
            if positions:
                name = self._name_of(file, rank)
                header, parts, size = self._content(file, positions)
                entry = FileEntry(
                    path=self._folder + name,
                    size=size,
                    header_size=len(header),
                    header_digest=digest(header),
                )
                yield _NewFile(name, entry, parts, positions)

    def _write_all(self, files: Iterable[_NewFile]) -> None:
        for file in files:
            self.write_object(file.name, file.parts, file.entry.size)

    def _content(
        self, file: FileImage, positions: list[int]
    ) -> tuple[bytes, list[memoryview | bytes], int]:
        """Header, bytes-like parts with it, and how many bytes they are."""
        if len(positions) == len(file.positions):
            return file.header, [self._memory[file.start : file.start + file.size]], file.size
        specs = [self._image.specs[p] for p in positions]
        header = file_header(file.item, specs)
        parts = [self._bytes_of(p) for p in positions]
        return header, [header, *parts], len(header) + sum(spec.size for spec in specs)

    def _bytes_of(self, position: int) -> memoryview:
        start = self._image.offsets[position]
        return self._memory[start : start + self._image.specs[position].size]

    def _digests(self, positions: Iterable[int]) -> dict[int, list[str]]:
        """Of each chunk of some tensors."""
        return {position: _chunk_digests(self._bytes_of(position)) for position in positions}


def _chunk_digests(content: memoryview) -> list[str]:
    if 0 < content.nbytes <= CHUNK_BYTES:
        return [digest(content)]
    return [digest(content[start:stop]) for start, stop in chunk_spans(content.nbytes)]


def _entries(
    image: Image,
    chunks: Mapping[int, list[str]],
    new: Iterable[_NewFile],
    held: Mapping[int, Held],
) -> tuple[list[FileEntry], list[TensorEntry]]:
    """The index's files, new ones first, and its tensors by position."""
    files: dict[str, FileEntry] = {}
    numbers: dict[str, int] = {}
    tensors: dict[int, TensorEntry] = {}

    def number_of(file: FileEntry) -> int:
        files.setdefault(file.path, file)
        return numbers.setdefault(file.path, len(numbers))

    for file in new:
        number, offset = number_of(file.entry), file.entry.header_size
        for position in file.positions:
            spec = image.specs[position]
            size = spec.size
            tensors[position] = TensorEntry(
                file=number,
                key=spec.key,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                size=size,
                chunks=chunks[position],
            )
            offset += size
    for position, earlier in held.items():
        number, tensor = number_of(earlier.file), earlier.tensor
        if tensor.file != number:
            tensor = msgspec.structs.replace(tensor, file=number)
        tensors[position] = tensor
    return list(files.values()), [tensors[position] for position in range(len(tensors))]
