"""Reading a checkpoint of several ranks: each reads what it needs, and no byte unverified.

Digests cover chunks of 4 MiB of each stored tensor, so rows of a tensor are read as the chunks
that hold them. Memory is what a caller asks for, and a few chunks.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ckpt_tasks.checkpointer.gather import IndexKeys
from ckpt_tasks.checkpointer.reader import check_files, load_tensors, positions_of, read_index
from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest, digest_of_chunks
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, FileEntry, Index, TensorEntry
from ckpt_tasks.format.safetensors import DTYPE_BYTES
from ckpt_tasks.store.base import Store

__all__ = ["Rows", "ShardedCheckpoint", "Stored", "open_sharded"]

_PARALLEL_READS = 4
_MANY = 20  # values that are named as different; the others are counted


class Stored(NamedTuple):
    """A tensor as it lies in the store: which rank wrote it, and as which of its tensors."""

    rank: int
    number: int


class Rows(NamedTuple):
    """Rows of a stored tensor, verified: writable bytes, dtype as safetensors spells it, shape."""

    data: memoryview
    dtype: str
    shape: tuple[int, ...]


def open_sharded(
    store: Store,
    layout: RunLayout,
    record: CommitRecord,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> ShardedCheckpoint:
    """Open a checkpoint for one of `world_size` ranks, however many have saved it.

    Reads the indexes, and nothing else yet.

    Raises
    ------
    CorruptCheckpointError
        An index is damaged or missing, or they do not fit together.
    StoreError
        Storage failed, which says nothing about the checkpoint.
    """
    with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="index") as pool:
        indexes = list(pool.map(lambda ref: read_index(store, layout, ref), record.indexes))
    indexes.sort(key=lambda index: index.rank)
    return ShardedCheckpoint(store, layout, record, indexes, rank=rank, world_size=world_size)


class ShardedCheckpoint:
    """A checkpoint that is read piece by piece.

    Which rank's state is whose: where as many ranks restore as have saved, each its own.
    Otherwise all restore rank 0's, with the parts of sharded tensors that each of them holds.

    Parameters
    ----------
    indexes
        Of all ranks that saved, in order.
    rank, world_size
        Of the process that restores.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        record: CommitRecord,
        indexes: Sequence[Index],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._store = store
        self._layout = layout
        self._keys = IndexKeys({index.rank: index for index in indexes})
        self._positions = [self._resolved(index) for index in indexes]
        self._loaded: dict[Stored, memoryview] = {}
        self._sized: set[str] = set()
        self.record = record
        self.indexes = indexes
        self.rank = rank
        self.world_size = world_size

    @property
    def is_resharded(self) -> bool:
        """Whether another number of ranks restores than has saved."""
        return self.world_size != self.record.world_size

    @property
    def source_rank(self) -> int:
        """The rank whose trees this one restores."""
        return 0 if self.is_resharded else self.rank

    @property
    def trees(self) -> dict[str, Any]:
        """Tracked name to tree, of `source_rank`."""
        return self.indexes[self.source_rank].items

    def stored(self, rank: int, position: int) -> Stored:
        """Where the tensor lies that the trees of `rank` refer to by `position`.

        Raises `CorruptCheckpointError` where there is none.
        """
        try:
            return self._positions[rank][position]
        except IndexError as error:
            raise CorruptCheckpointError(
                f"{self.record.id} refers to tensor {position} of {len(self._positions[rank])} of "
                f"rank {rank}"
            ) from error

    def entry(self, stored: Stored) -> TensorEntry:
        """The entry in the index of the rank that wrote it."""
        return self.indexes[stored.rank].tensors[stored.number]

    def read(self, stored: Stored, start: int = 0, stop: int | None = None) -> Rows:
        """Rows `start` to `stop` (exclusive) of a stored tensor; default: all of it.

        Raises
        ------
        CorruptCheckpointError
            A chunk that holds them is not what was committed.
        StoreError
            Storage failed.
        """
        entry = self.entry(stored)
        shape = tuple(entry.shape)
        if _size(entry) != entry.size:
            raise CorruptCheckpointError(f"tensor {entry.key!r} of {self.record.id} has no size")
        if not shape or (start == 0 and stop in (None, shape[0])):
            return Rows(self._bytes(stored, 0, entry.size), entry.dtype, shape)
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise CorruptCheckpointError(
                f"rows {start}..{stop} of tensor {entry.key!r} of {self.record.id}, which has "
                f"{shape[0]}"
            )
        row = entry.size // max(shape[0], 1)
        data = self._bytes(stored, start * row, stop * row)
        return Rows(data, entry.dtype, (stop - start, *shape[1:]))

    def preload(self, names: Collection[str] | None = None) -> None:
        """Read, many at once, the tensors that this rank will ask for; later reads find them.

        Those that are whole, and where no other number of ranks restores than has saved, this
        rank's parts of those that are sharded.

        Parameters
        ----------
        names
            Tracked names; default: all.

        Raises as `read`.
        """
        trees = [tree for name, tree in self.trees.items() if names is None or name in names]
        positions = positions_of(trees, skip="sharded" if self.is_resharded else None)
        wanted: dict[int, set[int]] = {}
        for position in positions:
            stored = self.stored(self.source_rank, position)
            wanted.setdefault(stored.rank, set()).add(stored.number)
        for rank, numbers in sorted(wanted.items()):
            loaded = load_tensors(self._store, self._layout, self.indexes[rank], numbers)
            for number, data in loaded.items():
                self._loaded[Stored(rank, number)] = data

    def forget(self) -> None:
        """Release the memory of what was preloaded."""
        self._loaded.clear()

    def verify_share(self) -> None:
        """Read and check this rank's share of all files; nothing is kept.

        When all ranks have done so, every byte is known to be what was committed.

        Raises as `read`.
        """
        for number, index in enumerate(self.indexes):
            if number % self.world_size == self.rank:
                for _ in check_files(self._store, self._layout, index):
                    pass

    def differing(self, names: Collection[str] | None = None) -> list[str]:
        """Values that were not the same on all ranks, as ``model.bn.running_mean``.

        A rank that restores another's loses its own of these. Sharded tensors are none of them.

        Parameters
        ----------
        names
            Tracked names that are looked at; default: all.
        """
        first, found = self.indexes[0].items, dict[str, None]()
        for name in first if names is None else names:
            for rank in range(1, len(self.indexes)):
                other = self.indexes[rank].items.get(name)
                for path in self._differences(first.get(name), other, rank, name):
                    found[path] = None
        listed = list(found)
        more = len(listed) - _MANY
        return [*listed[:_MANY], f"{more} more"] if more > 0 else listed

    def _differences(self, first: Any, other: Any, rank: int, path: str) -> Iterator[str]:
        """Paths at which rank 0's tree and that of `rank` differ."""
        tag = first.get("$") if isinstance(first, dict) else None
        if type(first) is not type(other) or (tag and tag != other.get("$")):
            yield path
        elif tag == "tensor":
            if self._digest(0, first["v"]) != self._digest(rank, other["v"]):
                yield path
        elif isinstance(first, dict | list) and tag != "sharded":
            mine, others = _named(first, tag, path), _named(other, tag, path)
            if [name for name, _ in mine] != [name for name, _ in others]:
                yield path
                return
            for (name, one), (_, two) in zip(mine, others, strict=True):
                yield from self._differences(one, two, rank, name)
        elif tag is None and first != other:
            yield path

    def _digest(self, rank: int, reference: Any) -> object:
        position = reference.get("index") if isinstance(reference, dict) else reference
        if type(position) is not int:
            return None
        return digest_of_chunks(self.entry(self.stored(rank, position)).chunks)

    def _resolved(self, index: Index) -> list[Stored]:
        """Of each position in this rank's trees, where the tensor lies."""
        shared = {entry.position: entry for entry in index.shared or []}
        own = iter(range(len(index.tensors)))
        places: list[Stored] = []
        for position in range(len(index.tensors) + len(shared)):
            entry = shared.get(position)
            if entry is None:
                places.append(Stored(index.rank, next(own)))
                continue
            found = self._keys.find(entry.rank, entry.item, entry.key)
            if found is None or digest_of_chunks(found[1].chunks) != entry.digest:
                raise CorruptCheckpointError(
                    f"rank {entry.rank} has not written {entry.item}[{entry.key!r}] as rank "
                    f"{index.rank} of the same checkpoint had it"
                )
            places.append(Stored(entry.rank, found[0]))
        return places

    def _bytes(self, stored: Stored, start: int, stop: int) -> memoryview:
        """Bytes of a stored tensor, from whole chunks that have been checked."""
        if start == stop:
            return memoryview(bytearray())
        loaded = self._loaded.get(stored)
        if loaded is not None:
            return loaded[start:stop]
        entry = self.entry(stored)
        path = self._checked_path(self.indexes[stored.rank].files[entry.file])
        memory = memoryview(mmap.mmap(-1, stop - start))

        def load(number: int, first: int, last: int) -> None:
            data = memoryview(self._read(path, entry.offset + first, entry.offset + last))
            if digest(data) != entry.chunks[number]:
                raise CorruptCheckpointError(
                    f"{path} is damaged: chunk {number} of tensor {entry.key!r} does not have the "
                    "digest that was committed"
                )
            low, high = max(first, start), min(last, stop)
            memory[low - start : high - start] = data[low - first : high - first]

        spans = list(chunk_spans(entry.size))
        wanted = range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))
        if len(wanted) == 1:
            load(wanted[0], *spans[wanted[0]])
        else:
            with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="rows") as pool:
                for _ in pool.map(lambda number: load(number, *spans[number]), wanted):
                    pass
        return memory

    def _checked_path(self, file: FileEntry) -> str:
        """Path of a file whose size has been looked at, before memory is taken for its tensors."""
        path = self._layout.in_run(file.path)
        if path not in self._sized:
            try:
                size = self._store.size(path)
            except ObjectNotFoundError as error:
                raise CorruptCheckpointError(f"{path} is missing from {self._store.url}") from error
            if size != file.size:
                raise CorruptCheckpointError(f"{path} has {size} bytes, committed were {file.size}")
            self._sized.add(path)
        return path

    def _read(self, path: str, start: int, stop: int) -> bytes:
        try:
            return self._store.read_range(path, start, stop)
        except ObjectNotFoundError as error:
            raise CorruptCheckpointError(f"{path} is missing from {self._store.url}") from error


def _size(entry: TensorEntry) -> int:
    size = DTYPE_BYTES.get(entry.dtype, 0)
    for extent in entry.shape:
        size *= extent
    return size


def _named(node: Any, tag: str | None, path: str) -> list[tuple[str, Any]]:
    """A node's children with their paths, as people know them from the value itself."""
    if tag == "state_dict":
        return [(path, node["v"][0]), (f"{path}._metadata", node["v"][1])]
    if tag in ("dict", "odict", "counter"):
        return [(f"{path}.{key}", value) for key, value in node["v"]]
    if tag is not None:
        return [(path, node["v"])]
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    return [(f"{path}.{key}", value) for key, value in pairs]
