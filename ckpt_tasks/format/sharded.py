"""Sharded tensors in trees: of each, the parts that ranks have saved, in whatever cut.

A leaf of a tree says of its tensor what one rank knew (see `state.sharding`). Put together over
the trees of all ranks, leaves at the same path are one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import Part

__all__ = ["SavedPart", "ShardedLeaves", "ShardedTensor"]

_TreePath = tuple[str, ...]


class SavedPart(NamedTuple):
    """One rank's part of a sharded tensor.

    Parameters
    ----------
    part
        Where it lies in the whole.
    rank, position
        Whose trees refer to it, and by what.
    details
        Of the reference to it (see `state.tensors`).
    """

    part: Part
    rank: int
    position: int
    details: Mapping[str, Any]


class ShardedTensor(NamedTuple):
    """A tensor that was saved in parts.

    Parameters
    ----------
    name
        For messages.
    shape
        Of the whole tensor.
    parts
        One for each place, all ranks' together.
    is_parameter, requires_grad
        What it is on the rank whose leaf this is.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[SavedPart, ...]
    is_parameter: bool
    requires_grad: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two that share their memory."""
        return self.shape, tuple((saved.rank, saved.position) for saved in self.parts)


class ShardedLeaves:
    """The sharded tensors of all ranks' trees.

    Parameters
    ----------
    trees
        Of each rank, by tracked name; not trusted.
    entry_shape
        Gives the extents of the stored image, by rank and position.
    rank
        Whose parts are taken where several ranks have saved the same one; else the first's.

    Raises
    ------
    CorruptCheckpointError
        A leaf that `capture` does not write.
    """

    def __init__(
        self,
        trees: Sequence[Mapping[str, Any]],
        entry_shape: Callable[[int, int], Sequence[int]],
        *,
        rank: int = 0,
    ) -> None:
        self._found: dict[tuple[_TreePath, tuple[int, ...]], dict[Part, SavedPart]] = {}
        ranks = sorted(range(len(trees)), key=lambda each: each != rank)
        for each in ranks:
            for name, tree in trees[each].items():
                with _Damage((name,)):
                    for path, leaf in _leaves(tree, (name,)):
                        with _Damage(path):
                            self._add(each, path, leaf, entry_shape)

    def numbered(self, name: str, tree: Any, *, first: int = 0) -> tuple[Any, list[ShardedTensor]]:
        """A copy of a tree in which sharded leaves are numbered from `first` on, and these.

        Raises `CorruptCheckpointError` as the class.
        """
        tensors: list[ShardedTensor] = []

        def copied(node: Any, path: _TreePath) -> Any:
            if _is_sharded(node):
                with _Damage(path):
                    tensors.append(self._tensor(path, node["v"][0]))
                return {"$": "sharded", "v": first + len(tensors) - 1}
            if isinstance(node, dict) and node.get("$") in _PAIRS:
                pairs = [[key, copied(value, inner)] for key, value, inner in _pairs(node, path)]
                return {"$": node["$"], "v": pairs}
            if isinstance(node, dict):
                return {key: copied(value, (*path, key)) for key, value in node.items()}
            if isinstance(node, list):
                return [copied(value, (*path, str(i))) for i, value in enumerate(node)]
            return node

        if not self._found:
            return tree, tensors
        with _Damage((name,)):
            return copied(tree, (name,)), tensors

    def _add(
        self,
        rank: int,
        path: _TreePath,
        leaf: Any,
        entry_shape: Callable[[int, int], Sequence[int]],
    ) -> None:
        facts, local = leaf
        shape = _extents(facts["shape"])
        parts = self._found.setdefault((path, shape), {})
        if local is None or facts["offsets"] is None:
            return  # its rank was outside of the mesh
        reference = local["v"]
        position = reference if type(reference) is int else reference["index"]
        details = reference if isinstance(reference, dict) else {}
        sizes = tuple(entry_shape(rank, position))
        if len(sizes) == len(shape) + 1 and "dtype" in details:
            sizes = sizes[:-1]  # complex values are stored as pairs of reals
        offsets = _extents(facts["offsets"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a part of {sizes} at {offsets} of {shape}")
        part = Part(offsets, sizes)
        if 0 not in sizes or 0 in shape:
            parts.setdefault(part, SavedPart(part, rank, position, details))

    def _tensor(self, path: _TreePath, facts: Any) -> ShardedTensor:
        shape = _extents(facts["shape"])
        return ShardedTensor(
            ".".join(path),
            shape,
            tuple(self._found[path, shape].values()),
            is_parameter=bool(facts.get("parameter")),
            requires_grad=bool(facts.get("grad")),
        )


class _Damage:
    """What reading a malformed leaf raises is damage of the checkpoint."""

    def __init__(self, path: _TreePath) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # RecursionError: nested deeper than anything that is saved.
        if isinstance(
            error, AttributeError | LookupError | RecursionError | TypeError | ValueError
        ):
            raise CorruptCheckpointError(f"{'.'.join(self._path)} is damaged: {error}") from error


_PAIRS = ("dict", "odict", "counter")
"""Tags of dicts whose keys are no plain text."""


def _extents(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} are no extents")
    return tuple(values)


def _is_sharded(node: Any) -> bool:
    return isinstance(node, dict) and node.get("$") == "sharded"


def _pairs(node: Any, path: _TreePath) -> Iterator[tuple[Any, Any, _TreePath]]:
    """Key, value and its path, which has the key and not its place: ranks may differ in these."""
    for key, value in node["v"]:
        yield key, value, (*path, json.dumps(key, sort_keys=True))


def _leaves(node: Any, path: _TreePath) -> Iterator[tuple[_TreePath, Any]]:
    if _is_sharded(node):
        yield path, node.get("v")
    elif isinstance(node, dict) and node.get("$") in _PAIRS:
        for _, value, inner in _pairs(node, path):
            yield from _leaves(value, inner)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, str(number)))
