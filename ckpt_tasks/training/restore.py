"""From a checkpoint that has been loaded, or opened, to the values of its tracked names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from ckpt_tasks.checkpointer.reader import LoadedCheckpoint
from ckpt_tasks.checkpointer.sharded_reader import Rows, ShardedCheckpoint
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.state.capture import RestoredValues, restore_values
from ckpt_tasks.state.resharding import SavedPart, ShardedValue, number_sharded, sharded_parts
from ckpt_tasks.state.rng import derived_rng
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.training.own import RNG

__all__ = ["restored_values"]


def restored_values(
    start: LoadedCheckpoint | ShardedCheckpoint,
    required: Collection[str],
    *,
    only: Collection[str] | None = None,
) -> RestoredValues:
    """The saved values of all tracked names, or of `only` some.

    A tensor that was saved in parts is a `ShardedValue`, which is read when it is known what
    takes it (see `state.resharding.place`).

    Raises `CorruptCheckpointError` where one of the `required` names is missing, or the trees
    do not fit the tensors.
    """
    source: _Source = _Opened(start) if isinstance(start, ShardedCheckpoint) else _Loaded(start)
    missing = set(required) - start.trees.keys()
    if missing:
        raise CorruptCheckpointError(f"{start.record.id} lacks {sorted(missing)}")
    trees = {name: tree for name, tree in start.trees.items() if only is None or name in only}
    values = _values(source, source.rank, trees)
    if RNG in trees and isinstance(start, ShardedCheckpoint) and start.is_resharded:
        values[RNG] = _rng_of_rank(source, start)
    return values


class _Source(Protocol):
    """Trees and stored tensors of all ranks that saved; `rank` is the one whose trees are taken."""

    rank: int

    @property
    def all_trees(self) -> Sequence[Mapping[str, Any]]: ...

    def shape(self, rank: int, position: int) -> Sequence[int]: ...

    def rows(self, rank: int, position: int, start: int, stop: int | None) -> Rows: ...


class _Loaded:
    """A checkpoint of one rank, in host memory."""

    rank = 0

    def __init__(self, start: LoadedCheckpoint) -> None:
        self._start = start
        self.all_trees = [start.trees]

    def shape(self, rank: int, position: int) -> Sequence[int]:
        return self._start.index.tensors[position].shape

    def rows(self, rank: int, position: int, start: int, stop: int | None) -> Rows:
        entries = self._start.index.tensors
        if position >= len(entries):
            raise CorruptCheckpointError(
                f"{self._start.record.id} refers to tensor {position} of {len(entries)}"
            )
        entry, data = entries[position], self._start.tensors[position]
        if stop is None or not entry.shape or (start, stop) == (0, entry.shape[0]):
            return Rows(data, entry.dtype, tuple(entry.shape))
        row = entry.size // max(entry.shape[0], 1)
        shape = (stop - start, *entry.shape[1:])
        return Rows(data[start * row : stop * row], entry.dtype, shape)


class _Opened:
    """A checkpoint of any number of ranks, read piece by piece."""

    def __init__(self, start: ShardedCheckpoint) -> None:
        self._start = start
        self.rank = start.source_rank
        self.all_trees = [index.items for index in start.indexes]

    def shape(self, rank: int, position: int) -> Sequence[int]:
        return self._start.entry(self._start.stored(rank, position)).shape

    def rows(self, rank: int, position: int, start: int, stop: int | None) -> Rows:
        return self._start.read(self._start.stored(rank, position), start, stop)


def _values(source: _Source, rank: int, trees: Mapping[str, Any]) -> RestoredValues:
    """Values of trees of one rank."""

    def tensor_at(position: int) -> torch.Tensor:
        return _tensor(source.rows(rank, position, 0, None))

    numbered, sharded = _numbered(source, rank, trees)
    return restore_values(numbered, tensor_at, lambda number: sharded[number])


def _numbered(
    source: _Source, rank: int, trees: Mapping[str, Any]
) -> tuple[dict[str, Any], list[ShardedValue]]:
    """The trees with their sharded leaves numbered, and these."""
    parts = sharded_parts(
        [{name: of_rank.get(name) for name in trees} for of_rank in source.all_trees], source.shape
    )
    if not parts:
        return dict(trees), []

    def read(rank: int, position: int, first: int, last: int) -> torch.Tensor:
        return _tensor(source.rows(rank, position, first, last))

    tied: dict[object, ShardedValue] = {}

    def value_of(path: tuple[str, ...], facts: Any) -> ShardedValue:
        own_first: Callable[[SavedPart], bool] = lambda part: part.rank != rank  # noqa: E731
        try:
            value = ShardedValue(".".join(path), facts, sorted(parts[path], key=own_first), read)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"{'.'.join(path)} is damaged: {error}") from error
        return tied.setdefault((value.identity, tuple(value.shape)), value)

    numbered: dict[str, Any] = {}
    values: list[ShardedValue] = []
    for name, tree in trees.items():
        numbered[name], found = number_sharded(name, tree, value_of, first=len(values))
        values += found
    return numbered, values


def _rng_of_rank(source: _Source, start: ShardedCheckpoint) -> Any:
    """Random generators of a rank where another number of ranks has saved."""
    saved = [
        _values(source, rank, {RNG: trees[RNG]})[RNG]
        for rank, trees in enumerate(source.all_trees)
        if RNG in trees
    ]
    return derived_rng(saved, start.rank)


def _tensor(rows: Rows) -> torch.Tensor:
    return tensor_from_buffer(rows.data, rows.dtype, rows.shape)
