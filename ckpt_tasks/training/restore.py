"""From a checkpoint that has been loaded, or opened, to the values of its tracked names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from ckpt_tasks.checkpointer.memory import fresh_memory
from ckpt_tasks.checkpointer.reader import LoadedCheckpoint
from ckpt_tasks.checkpointer.runs import Target, copy_runs
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint
from ckpt_tasks.checkpointer.stored import Image, Stored, StoredTensor
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import Part, whole
from ckpt_tasks.format.records import TensorEntry
from ckpt_tasks.format.sharded import ShardedLeaves, ShardedTensor
from ckpt_tasks.state.capture import restore_values
from ckpt_tasks.state.resharding import ShardedValue
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.rng import derived_rng
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.training.deferred import defer_images, without_device
from ckpt_tasks.training.own import RNG

__all__ = ["restored_values"]


def restored_values(
    start: LoadedCheckpoint | ShardedCheckpoint,
    required: Collection[str],
    *,
    only: Collection[str] | None = None,
    optimizers: Collection[str] = (),
    keep_device: bool = True,
) -> RestoredValues:
    """The saved values of all tracked names, or of `only` some.

    A tensor that was saved in parts is a `ShardedValue`, which is read when it is known what takes
    it (see `state.placing`). So is the memory of a large tensor that was saved whole, where
    another number of ranks restores: many of them may need a part of it only.

    Parameters
    ----------
    required
        Names that must be there.
    optimizers
        Names that optimizers take, which put state where their parameters are, wherever it was.
    keep_device
        Whether other tensors go to the device where they were; else all stay on the CPU.

    Raises `CorruptCheckpointError` where one of the `required` names is missing, or the trees
    do not fit the tensors.
    """
    source: _Source = _Opened(start) if isinstance(start, ShardedCheckpoint) else _Loaded(start)
    missing = set(required) - start.trees.keys()
    if missing:
        raise CorruptCheckpointError(f"{start.record.id} lacks {sorted(missing)}")
    trees = {name: tree for name, tree in start.trees.items() if only is None or name in only}
    if not keep_device:
        trees = {name: without_device(tree) for name, tree in trees.items()}
    values = _values(source, source.rank, trees, optimizers)
    if RNG in trees and isinstance(start, ShardedCheckpoint) and start.is_resharded:
        values[RNG] = _rng_of_rank(source, start)
    return values


class _Source(Protocol):
    """Trees and images of all ranks that saved; `rank` is the one whose trees are taken."""

    rank: int

    @property
    def all_trees(self) -> Sequence[Mapping[str, Any]]: ...

    def leaves(self, names: Collection[str]) -> ShardedLeaves: ...

    def image(self, rank: int, position: int) -> Image: ...

    def blocks(self, wanted: Sequence[tuple[ShardedTensor, Part]]) -> list[Image]: ...

    def defers(self, rank: int, position: int) -> bool: ...

    def unread(self, rank: int, position: int) -> Image: ...

    def fill(self, rank: int, wanted: Mapping[int, tuple[Sequence[Part], memoryview]]) -> None: ...


class _Loaded:
    """A checkpoint of one rank, in host memory."""

    rank = 0

    def __init__(self, start: LoadedCheckpoint) -> None:
        self._start = start
        self.all_trees = [start.trees]

    def leaves(self, names: Collection[str]) -> ShardedLeaves:
        trees = {name: tree for name, tree in self._start.trees.items() if name in names}
        return ShardedLeaves([trees], lambda rank, position: self._entry(position).shape)

    def image(self, rank: int, position: int) -> Image:
        return self._start.image(position)

    def blocks(self, wanted: Sequence[tuple[ShardedTensor, Part]]) -> list[Image]:
        return [self._block(sharded, part) for sharded, part in wanted]

    def defers(self, rank: int, position: int) -> bool:
        return False

    def unread(self, rank: int, position: int) -> Image:
        return self.image(rank, position)

    def fill(self, rank: int, wanted: Mapping[int, tuple[Sequence[Part], memoryview]]) -> None:
        """All is there."""

    def _block(self, sharded: ShardedTensor, block: Part) -> Image:
        """As it was saved, of memory of its own where it is no part that was."""
        positions = {saved.part: saved.position for saved in sharded.parts}
        for part, position in positions.items():
            if part[:2] == block[:2]:
                return self.image(0, position)
        tensor = StoredTensor(
            sharded.name,
            sharded.shape,
            {part: (Stored(0, number), self._entry(number)) for part, number in positions.items()},
        )
        tensor.check_covers(block)
        memory = fresh_memory(tensor.size_of(block))
        for stored, runs in tensor.runs([block], block):
            copy_runs(Target(runs, memory), 0, self._start.tensors[stored.number])
        return tensor.image(block, memory)

    def _entry(self, position: int) -> TensorEntry:
        entries = self._start.index.tensors
        if not 0 <= position < len(entries):
            raise CorruptCheckpointError(
                f"{self._start.record.id} refers to tensor {position} of {len(entries)}"
            )
        return entries[position]


class _Opened:
    """A checkpoint of any number of ranks, read block by block."""

    def __init__(self, start: ShardedCheckpoint) -> None:
        self._start = start
        self.rank = start.source_rank
        self.all_trees = [index.items for index in start.indexes]
        self.leaves = start.leaves
        self.defers = start.defers

    def image(self, rank: int, position: int) -> Image:
        tensor = self._start.image_at(rank, position)
        return self._start.read([(tensor, whole(tensor.shape))])[0]

    def blocks(self, wanted: Sequence[tuple[ShardedTensor, Part]]) -> list[Image]:
        return self._start.read([(self._start.tensor_of(each), part) for each, part in wanted])

    def unread(self, rank: int, position: int) -> Image:
        return self._start.unread(self._start.image_at(rank, position))

    def fill(self, rank: int, wanted: Mapping[int, tuple[Sequence[Part], memoryview]]) -> None:
        self._start.fill(
            (self._start.image_at(rank, position), blocks, memory)
            for position, (blocks, memory) in wanted.items()
        )


def _values(
    source: _Source, rank: int, trees: Mapping[str, Any], optimizers: Collection[str] = ()
) -> RestoredValues:
    """Values of trees of one rank."""
    numbered, sharded = _numbered(source, trees)
    numbered, waiting = defer_images(
        numbered, optimizers, lambda position: source.defers(rank, position)
    )
    unread: dict[int, Image] = {}

    def tensor_at(position: int) -> torch.Tensor:
        if position not in waiting:
            return _tensor(source.image(rank, position))
        unread[position] = source.unread(rank, position)
        return _tensor(unread[position])

    def read(wanted: Mapping[int, Sequence[Part]]) -> None:
        # Of what nobody has come by, in a module's metadata say, all: no value is ever made up.
        blocks = {p: wanted.get(p, [whole(image.shape)]) for p, image in unread.items()}
        source.fill(rank, {p: (blocks[p], image.data) for p, image in unread.items()})
        unread.clear()

    return restore_values(numbered, tensor_at, lambda number: sharded[number], read=read)


def _numbered(
    source: _Source, trees: Mapping[str, Any]
) -> tuple[dict[str, Any], list[ShardedValue]]:
    """The trees with their sharded leaves numbered, and these."""
    leaves = source.leaves(trees.keys())

    def read(wanted: Sequence[tuple[ShardedTensor, Part]]) -> list[torch.Tensor]:
        return [_tensor(image) for image in source.blocks(wanted)]

    tied: dict[object, ShardedValue] = {}
    numbered: dict[str, Any] = {}
    values: list[ShardedValue] = []
    for name, tree in trees.items():
        numbered[name], found = leaves.numbered(name, tree, first=len(values))
        values += [tied.setdefault(each.identity, ShardedValue(each, read)) for each in found]
    return numbered, values


def _rng_of_rank(source: _Source, start: ShardedCheckpoint) -> Any:
    """Random generators of a rank where another number of ranks has saved."""
    start.preload_of_all([RNG])
    saved = [
        _values(source, rank, {RNG: trees[RNG]})[RNG]
        for rank, trees in enumerate(source.all_trees)
        if RNG in trees
    ]
    return derived_rng(saved, start.rank)


def _tensor(image: Image) -> torch.Tensor:
    return tensor_from_buffer(image.data, image.dtype, image.shape)
