"""Reading a checkpoint of several ranks: each reads what it needs, and no byte unverified.

A rank that restores knows which tensors it will ask for before it knows which blocks of them its
live objects take. So it reads twice, and no byte at both times: before it is agreed that this
checkpoint is whole, what it surely needs and its share of the rest (`preload`, `verify_rest`); and
what its blocks have beyond that when they are known (`read`, `fill`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ckpt_tasks.checkpointer.gather import IndexKeys
from ckpt_tasks.checkpointer.memory import fresh_memory, memory_for
from ckpt_tasks.checkpointer.reader import positions_of, read_index
from ckpt_tasks.checkpointer.runs import Target, copy_runs
from ckpt_tasks.checkpointer.stored import (
    Image,
    Stored,
    StoredReader,
    StoredTensor,
    joined_rows,
)
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.format.blocks import (
    Part,
    overlap,
    rest_of,
    runs_between,
    share_of_rows,
    whole,
    without_overlaps,
)
from ckpt_tasks.format.digest import CHUNK_BYTES, digest_of_chunks
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, Index, TensorEntry
from ckpt_tasks.format.sharded import ShardedLeaves, ShardedTensor
from ckpt_tasks.store.base import Store

__all__ = ["Block", "ShardedCheckpoint", "open_rank", "open_sharded"]

_PARALLEL_READS = 4

Block = tuple[StoredTensor, Part]
"""A tensor, and what of it is wanted."""


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
    if [index.rank for index in indexes] != list(range(record.world_size)):
        raise CorruptCheckpointError(
            f"{record.id} was saved by {record.world_size} ranks and names the indexes of "
            f"{[index.rank for index in indexes]}"
        )
    return ShardedCheckpoint(store, layout, record, indexes, rank=rank, world_size=world_size)


def open_rank(
    store: Store, layout: RunLayout, record: CommitRecord, rank: int
) -> ShardedCheckpoint:
    """Open a checkpoint as `rank` of those that have saved it, in whatever process.

    Raises `ConfigError` where there is no such rank; else as `open_sharded`.
    """
    if not 0 <= rank < record.world_size:
        raise ConfigError(f"{record.id} was saved by {record.world_size} rank(s); none is {rank}")
    return open_sharded(store, layout, record, rank=rank, world_size=record.world_size)


class ShardedCheckpoint:
    """A checkpoint that is read block by block.

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
        self._keys = IndexKeys({index.rank: index for index in indexes})
        self._positions = [self._resolved(index) for index in indexes]
        self._row_blocks = [
            {tensor.position: tensor for tensor in index.row_blocks or []} for index in indexes
        ]
        self._leaves: dict[frozenset[str] | None, ShardedLeaves] = {}
        self._kept: dict[object, tuple[Part, Image]] = {}
        self.reader = StoredReader(store, layout, indexes)
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
        """Where the image lies that the trees of `rank` refer to by `position`.

        Raises `CorruptCheckpointError` where there is none.
        """
        positions = self._positions[rank]
        if not 0 <= position < len(positions):
            raise CorruptCheckpointError(
                f"{self.record.id} refers to tensor {position} of {len(positions)} of rank {rank}"
            )
        return positions[position]

    def entry(self, rank: int, position: int) -> TensorEntry:
        """The entry of what the trees of `rank` refer to by `position`."""
        return self.reader.entry(self.stored(rank, position))

    def leaves(self, names: Collection[str] | None = None) -> ShardedLeaves:
        """The sharded tensors of all ranks' trees, under some tracked names; default: all."""
        key = None if names is None else frozenset(names)
        if key not in self._leaves:
            trees = [
                {name: tree for name, tree in index.items.items() if key is None or name in key}
                for index in self.indexes
            ]
            self._leaves[key] = ShardedLeaves(
                trees, lambda *place: self.entry(*place).shape, rank=self.source_rank
            )
        return self._leaves[key]

    def chunks(self, rank: int, position: int) -> list[str]:
        """Digests of what the trees of `rank` refer to by `position`, chunk by chunk."""
        split = self._row_blocks[rank].get(position)
        positions = [position] if split is None else split.positions
        return [digest for each in positions for digest in self.entry(rank, each).chunks]

    def split_tensors(self) -> Iterator[StoredTensor]:
        """Those of all ranks that were saved in blocks of rows."""
        for rank, tensors in enumerate(self._row_blocks):
            for position in tensors:
                yield self.image_at(rank, position)

    def image_at(self, rank: int, position: int) -> StoredTensor:
        """What the trees of `rank` refer to by `position`: a tensor of one part, or of its rows."""
        stored = self.stored(rank, position)
        entry = self.reader.entry(stored)
        split = self._row_blocks[rank].get(position)
        if split is not None:
            blocks = [self.stored(rank, each) for each in split.positions]
            return joined_rows(split.key, [(each, self.reader.entry(each)) for each in blocks])
        return StoredTensor(entry.key, entry.shape, {whole(entry.shape): (stored, entry)})

    def tensor_of(self, sharded: ShardedTensor) -> StoredTensor:
        """Where all parts of a sharded tensor lie."""
        parts = {
            saved.part: (stored, self.reader.entry(stored))
            for saved in sharded.parts
            for stored in [self.stored(saved.rank, saved.position)]
        }
        return StoredTensor(sharded.name, sharded.shape, parts)

    def read(self, blocks: Sequence[Block]) -> list[Image]:
        """Blocks of tensors, all in one go.

        What was preloaded of them is not read again. A block that was preloaded as such is handed
        out in the memory in which it lies, at every call.

        Raises
        ------
        CorruptCheckpointError
            A chunk that holds some of it is not what was committed, or nothing holds it.
        StoreError
            Storage failed.
        """
        found: list[Image | None] = [self._kept_as_such(*block) for block in blocks]
        absent = [number for number, image in enumerate(found) if image is None]
        read = self._read([blocks[number] for number in absent]) if absent else []
        for number, image in zip(absent, read, strict=True):
            found[number] = image
        return [image for image in found if image is not None]

    def defers(self, rank: int, position: int) -> bool:
        """Whether a tensor waits, for all but this rank's share of it, until it is known what of it
        is needed: a smaller one is a chunk that is read anyway.
        """
        if not self.is_resharded:
            return False
        return self.image_at(rank, position).nbytes > CHUNK_BYTES

    def unread(self, tensor: StoredTensor) -> Image:
        """Memory for all of a tensor, for `fill`; where that was preloaded, its values too."""
        everything = whole(tensor.shape)
        kept = self._kept_as_such(tensor, everything)
        if kept is not None:
            return kept
        tensor.check_covers(everything)
        self.reader.check_files(tensor.parts.values())
        return tensor.image(everything, fresh_memory(tensor.size_of(everything)))

    def fill(self, wanted: Iterable[tuple[StoredTensor, Sequence[Part], memoryview]]) -> None:
        """Read blocks of tensors into memory for all of each, in one go.

        Raises as `read`.
        """
        self._fill(
            [
                (tensor, whole(tensor.shape), without_overlaps(blocks), memory)
                for tensor, blocks, memory in wanted
                if self._kept_as_such(tensor, whole(tensor.shape)) is None
            ]
        )

    def preload(self, names: Collection[str] | None = None) -> None:
        """Read the tensors that this rank will ask for; later reads find them.

        Of sharded ones, where as many ranks restore as have saved, its own parts. Else, of these
        and of other large ones, the rows that are this rank's as FSDP2 cuts them: together the
        ranks read all.

        Parameters
        ----------
        names
            Tracked names; default: all.

        Raises as `read`.
        """
        self._keep(self._own_blocks(names))

    def preload_of_all(self, names: Collection[str]) -> None:
        """Read what every rank had of some tracked names of which no tensor is sharded.

        Raises as `read`.
        """
        self._keep(
            (tensor, whole(tensor.shape))
            for index in self.indexes
            for position in sorted(positions_of(index.items.get(name) for name in names))
            for tensor in [self.image_at(index.rank, position)]
        )

    def verify_rest(self) -> None:
        """Read and check this rank's share of what no rank preloads; nothing is kept.

        That is what other ranks had of their own, where another number of ranks restores. When
        all ranks have preloaded and done this, every byte is known to be what was committed.

        Raises as `read`.
        """
        asked_for = {
            stored for tensor, _ in self._own_blocks(None) for stored in tensor.parts.values()
        }
        rest = {
            stored: ()
            for number, index in enumerate(self.indexes)
            if number % self.world_size == self.rank
            for stored in (Stored(index.rank, each) for each in range(len(index.tensors)))
            if stored not in asked_for
        }
        self.reader.check_files(rest)
        self.reader.read(rest)

    def _own_blocks(self, names: Collection[str] | None) -> Iterator[Block]:
        """What this rank will ask for, as far as that is known."""
        leaves, rank = self.leaves(names), self.source_rank
        trees = {name: tree for name, tree in self.trees.items() if names is None or name in names}
        for position in sorted(positions_of(trees.values(), skip="sharded")):
            tensor = self.image_at(rank, position)
            waits = self.defers(rank, position)
            yield tensor, self._share(tensor) if waits else whole(tensor.shape)
        for name, tree in trees.items():
            for sharded in leaves.numbered(name, tree)[1]:
                if self.is_resharded:
                    tensor = self.tensor_of(sharded)
                    yield tensor, self._share(tensor)
                elif sharded.parts and sharded.parts[0].rank == rank:
                    yield self.tensor_of(sharded), sharded.parts[0].part

    def _share(self, tensor: StoredTensor) -> Part:
        return share_of_rows(tensor.shape, self.rank, self.world_size)

    def _keep(self, blocks: Iterable[Block]) -> None:
        distinct = {tensor.identity: (tensor, block) for tensor, block in blocks}
        absent = [block for block in distinct.values() if self._kept_as_such(*block) is None]
        for (tensor, block), image in zip(absent, self._read(absent), strict=True):
            self._kept[tensor.identity] = block, image

    def _kept_as_such(self, tensor: StoredTensor, block: Part) -> Image | None:
        kept, image = self._kept.get(tensor.identity, (None, None))
        return image if kept is not None and kept[:2] == block[:2] else None

    def _read(self, blocks: Sequence[Block]) -> list[Image]:
        for tensor, block in blocks:
            tensor.check_covers(block)
        self.reader.check_files(
            {
                stored
                for tensor, block in blocks
                for stored in tensor.holding(self._not_kept(tensor, block))
            }
        )
        sizes = {number: tensor.size_of(block) for number, (tensor, block) in enumerate(blocks)}
        memory = memory_for(sizes)
        self._fill(
            [(tensor, block, [block], memory[n]) for n, (tensor, block) in enumerate(blocks)]
        )
        return [tensor.image(block, memory[n]) for n, (tensor, block) in enumerate(blocks)]

    def _fill(
        self, wanted: Sequence[tuple[StoredTensor, Part, Sequence[Part], memoryview]]
    ) -> None:
        """Of tensors, blocks into the memory of one that holds them."""
        to_read: dict[Stored, list[Target]] = {}
        for tensor, holder, blocks, memory in wanted:
            missing = [piece for block in blocks for piece in self._not_kept(tensor, block)]
            for stored, runs in tensor.runs(missing, holder):
                to_read.setdefault(stored, []).append(Target(runs, memory))
        self.reader.read(to_read)
        for tensor, holder, blocks, memory in wanted:
            for block in blocks:
                self._copy_kept(tensor, holder, block, memory)

    def _not_kept(self, tensor: StoredTensor, block: Part) -> list[Part]:
        kept, _ = self._kept.get(tensor.identity, (None, None))
        if 0 in block.sizes:
            return []
        return [block] if kept is None else list(rest_of(block, kept))

    def _copy_kept(
        self, tensor: StoredTensor, holder: Part, block: Part, memory: memoryview
    ) -> None:
        kept, image = self._kept.get(tensor.identity, (None, None))
        common = None if kept is None else overlap(kept, block)
        if kept is not None and image is not None and common is not None:
            runs = runs_between(common, kept, holder, tensor.unit)
            copy_runs(Target(runs, memory), 0, image.data)

    def _resolved(self, index: Index) -> list[Stored]:
        """Of each position in this rank's trees, where the image lies."""
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
