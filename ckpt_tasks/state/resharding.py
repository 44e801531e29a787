"""Sharded tensors back from storage, onto whatever placement the live object has.

A saved sharded tensor is the parts that ranks have written, in whatever cut. What is read of it
depends on what takes it: a DTensor takes its own rank's part, a plain tensor all of it. Which
saved part holds which piece of that is torch.distributed.checkpoint's to say. Nothing here
communicates, and no optimizer is stepped to learn what state it would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ckpt_tasks.errors import CorruptCheckpointError, StateError
from ckpt_tasks.state.modules import canonical_state_dict
from ckpt_tasks.state.sharding import Part, dtensor_on, is_dtensor, part_of
from ckpt_tasks.state.tensors import values_from_image

__all__ = ["SavedPart", "ShardedValue", "number_sharded", "place", "sharded_parts"]

ReadRows = Callable[[int, int, int, int], torch.Tensor]
"""Of rank, position in its trees, first row and the one behind the last: the stored image."""


class SavedPart(NamedTuple):
    """One rank's part of a sharded tensor.

    Parameters
    ----------
    rank, position
        Whose trees refer to it, and by what.
    details
        Of the reference to it (see `state.tensors`).
    """

    part: Part
    rank: int
    position: int
    details: Mapping[str, Any]


class ShardedValue:
    """A tensor that was saved in parts, not yet read.

    Parameters
    ----------
    name
        For messages.
    facts
        Of its leaf (see `state.sharding`), not trusted.
    parts
        All that were saved, of any ranks; the first of two that lie at one place is taken.
    read
        Reads rows of one.

    Raises
    ------
    ValueError
        Facts that no leaf has.
    """

    def __init__(self, name: str, facts: Any, parts: Sequence[SavedPart], read: ReadRows) -> None:
        self.name = name
        self.shape = torch.Size(_extents(facts["shape"]))
        self._facts = facts
        self._read = read
        places: dict[Part, SavedPart] = {}
        for saved in parts:
            if len(saved.part.offsets) != len(self.shape):
                raise ValueError(f"a part of {name} has other dimensions than it")
            if 0 not in saved.part.sizes or 0 in self.shape:
                places.setdefault(saved.part, saved)
        self._parts = list(places.values())

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two values that share their memory."""
        return tuple((saved.rank, saved.position) for saved in self._parts)

    def whole(self) -> torch.Tensor:
        """All of it, on the CPU; a parameter, or requiring grad, where it was saved as such."""
        tensor = self.piece(Part((0,) * len(self.shape), tuple(self.shape)))
        if self._facts.get("parameter"):
            return torch.nn.Parameter(tensor, requires_grad=bool(self._facts.get("grad")))
        return tensor.requires_grad_() if self._facts.get("grad") else tensor

    def piece(self, wanted: Part) -> torch.Tensor:
        """One block of it, on the CPU, in memory of its own.

        Raises `CorruptCheckpointError` where the saved parts do not cover it.
        """
        same = next((p for p in self._parts if p.part[:2] == wanted[:2]), None)
        if same is not None:
            return self._rows(same, 0, same.part.sizes[0] if same.part.sizes else 0)
        dtype = self._dtype()
        target = torch.empty(wanted.sizes, dtype=dtype)
        covered = 0
        for saved, source, destination, lengths in self._overlaps(wanted):
            rows = self._rows(saved, source[0], source[0] + lengths[0])
            piece = _narrow(rows, (0, *source[1:]), lengths)
            _narrow(target, destination, lengths).copy_(piece)
            covered += piece.numel()
        if covered != target.numel():
            raise CorruptCheckpointError(
                f"the parts in which {self.name} was saved hold {covered} of the "
                f"{target.numel()} values at {list(wanted.offsets)}"
            )
        return target

    def _overlaps(
        self, wanted: Part
    ) -> Iterator[tuple[SavedPart, Sequence[int], Sequence[int], Sequence[int]]]:
        """Saved part, offsets in it, offsets in the wanted one, extents."""
        from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        if 0 in wanted.sizes:
            return
        metadata = TensorStorageMetadata(
            properties=TensorProperties(),
            size=self.shape,
            chunks=[_chunk(saved.part) for saved in self._parts],
        )
        items = create_read_items_for_chunk_list(self.name, metadata, [_chunk(wanted)])
        for item in items:
            assert item.storage_index.index is not None
            saved = self._parts[item.storage_index.index]
            yield saved, item.storage_offsets, item.dest_offsets, item.lengths

    def _dtype(self) -> torch.dtype:
        if not self._parts:
            raise CorruptCheckpointError(f"no part of {self.name} was saved")
        return self._rows(self._parts[0], 0, 0).dtype

    def _rows(self, saved: SavedPart, start: int, stop: int) -> torch.Tensor:
        whole = not saved.part.sizes or (start, stop) == (0, saved.part.sizes[0])
        image = self._read(saved.rank, saved.position, start, stop)
        # Where a part is read as it was, its memory format comes back too; its device never.
        members = ("dtype", "stride") if whole else ("dtype",)
        details = {key: saved.details[key] for key in members if key in saved.details}
        tensor = values_from_image(image, details)
        sizes = saved.part.sizes if whole else (stop - start, *saved.part.sizes[1:])
        if tuple(tensor.shape) != tuple(sizes):
            raise CorruptCheckpointError(
                f"a part of {self.name} has shape {list(tensor.shape)}, not {list(sizes)}"
            )
        return tensor


def _extents(values: Any) -> list[int]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} are no extents")
    return values


def _chunk(part: Part) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor


# -- trees ----------------------------------------------------------------------------------------

TreePath = tuple[str, ...]


def sharded_parts(
    trees: Sequence[Mapping[str, Any]], entry_shape: Callable[[int, int], Sequence[int]]
) -> dict[TreePath, list[SavedPart]]:
    """Parts of each sharded tensor, by tracked name and path in its tree, of all ranks' trees.

    Parameters
    ----------
    trees
        Of each rank, by tracked name; not trusted.
    entry_shape
        Gives the extents of the stored image, by rank and position.

    Raises
    ------
    CorruptCheckpointError
        A leaf that `capture` does not write.
    """
    found: dict[TreePath, list[SavedPart]] = {}
    for rank, items in enumerate(trees):
        for name, tree in items.items():
            for path, node in _leaves(tree, (name,)):
                parts = found.setdefault(path, [])
                try:
                    parts += _saved_parts(rank, node, entry_shape)
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise CorruptCheckpointError(f"{'.'.join(path)} is damaged: {error}") from error
    return found


def number_sharded(
    name: str,
    tree: Any,
    value_of: Callable[[TreePath, Any], ShardedValue],
    *,
    first: int = 0,
) -> tuple[Any, list[ShardedValue]]:
    """A copy of a tree in which sharded leaves are numbered from `first` on, and their values.

    Parameters
    ----------
    value_of
        Called with a leaf's path, as `sharded_parts` gives it, and the leaf's facts.
    """
    values: list[ShardedValue] = []

    def numbered(node: Any, path: TreePath) -> Any:
        if _is_sharded(node):
            values.append(value_of(path, node["v"][0]))
            return {"$": "sharded", "v": first + len(values) - 1}
        if isinstance(node, dict) and node.get("$") in _PAIRS:
            pairs = [[key, numbered(value, inner)] for key, value, inner in _pairs(node, path)]
            return {"$": node["$"], "v": pairs}
        if isinstance(node, dict):
            return {key: numbered(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [numbered(value, (*path, str(i))) for i, value in enumerate(node)]
        return node

    return numbered(tree, (name,)), values


_PAIRS = ("dict", "odict", "counter")
"""Tags of dicts whose keys are no plain text."""


def _is_sharded(node: Any) -> bool:
    return isinstance(node, dict) and node.get("$") == "sharded"


def _pairs(node: Any, path: TreePath) -> Iterator[tuple[Any, Any, TreePath]]:
    """Key, value and its path, which has the key and not its place: ranks may differ in these."""
    for key, value in node["v"]:
        yield key, value, (*path, json.dumps(key, sort_keys=True))


def _leaves(node: Any, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
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


def _saved_parts(
    rank: int, node: Any, entry_shape: Callable[[int, int], Sequence[int]]
) -> list[SavedPart]:
    """The part of a leaf; none where its rank was outside of the mesh."""
    facts, local = node
    shape = _extents(facts["shape"])
    if local is None or facts["offsets"] is None:
        return []
    reference = local["v"]
    position = reference if type(reference) is int else reference["index"]
    details = reference if isinstance(reference, dict) else {}
    sizes = list(entry_shape(rank, position))
    if len(sizes) == len(shape) + 1 and "dtype" in details:
        sizes.pop()  # complex values are stored as pairs of reals
    offsets = _extents(facts["offsets"])
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise ValueError(f"a part of {sizes} at {offsets} of {shape}")
    return [SavedPart(Part(tuple(offsets), tuple(sizes)), rank, position, details)]


# -- live objects ---------------------------------------------------------------------------------


Keep = Callable[[torch.Tensor, torch.Tensor], None]


def place(name: str, item: Any, saved: Any, keep: Keep) -> Any:
    """The saved state of an object, its tensors placed as those of the live object are.

    Parameters
    ----------
    item
        The live object: a DTensor of it takes this rank's part, whatever was saved; a plain
        tensor takes all of it.
    saved
        From `restore_values`.
    keep
        Told of each saved plain tensor and what took its place.

    Raises
    ------
    StateError
        A saved tensor has another shape than the DTensor that takes it.
    CorruptCheckpointError
        The saved parts of a tensor do not make it up.
    """
    placer = _Placer(name, keep)
    if isinstance(item, torch.nn.Module):
        return placer.like(saved, canonical_state_dict(item), (name,))
    if isinstance(item, torch.optim.Optimizer):
        return placer.optimizer(saved, item)
    live = None
    if _is_distributed() and callable(getattr(item, "state_dict", None)):
        live = item.state_dict()
    return placer.like(saved, live, (name,))


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Placer:
    def __init__(self, name: str, keep: Keep) -> None:
        self._name = name
        self._keep = keep
        self._placed: dict[object, Any] = {}

    def like(self, saved: Any, live: Any, path: tuple[object, ...]) -> Any:
        """`saved`, with tensors placed as those at the same places of `live`."""
        if isinstance(saved, ShardedValue | torch.Tensor):
            return self._tensor(saved, live, path)
        if isinstance(saved, dict):
            members = live if isinstance(live, dict) else {}
            for key, value in saved.items():
                saved[key] = self.like(value, members.get(key), (*path, key))
        elif isinstance(saved, list | tuple):
            same = type(live) is type(saved) and len(live) == len(saved)
            placed = [
                self.like(value, live[number] if same else None, (*path, number))
                for number, value in enumerate(saved)
            ]
            if isinstance(saved, tuple):
                return tuple(placed)
            saved[:] = placed
        return saved

    def optimizer(self, saved: Any, item: torch.optim.Optimizer) -> Any:
        """Each parameter's state as the parameter is placed, where it has its shape."""
        if not isinstance(saved, dict) or not isinstance(saved.get("param_groups"), list):
            return saved  # what takes it says what is wrong
        parameters = {
            number: parameter
            for group, saved_group in zip(item.param_groups, saved["param_groups"], strict=False)
            for parameter, number in zip(group["params"], saved_group["params"], strict=False)
        }
        for number, values in saved["state"].items():
            parameter = parameters.get(number)
            live = item.state.get(parameter, {}) if parameter is not None else {}
            for key, value in values.items() if isinstance(values, dict) else ():
                like = live.get(key)
                if like is None and _has_shape(value, parameter):
                    like = parameter
                values[key] = self.like(value, like, (self._name, "state", number, key))
        saved["param_groups"] = self.like(
            saved["param_groups"], item.param_groups, (self._name, "param_groups")
        )
        return saved

    def _tensor(self, saved: Any, live: Any, path: tuple[object, ...]) -> Any:
        target = live if is_dtensor(live) else None
        if isinstance(saved, torch.Tensor) and (target is None or is_dtensor(saved)):
            return saved
        # A tensor that stands in two places is one object in both.
        key = (id(saved), None if target is None else (target.device_mesh, target.placements))
        if key not in self._placed:
            self._placed[key] = self._new(saved, target, path)
        return self._placed[key]

    def _new(self, saved: Any, target: Any, path: tuple[object, ...]) -> Any:
        if target is None:
            return saved.whole()
        if saved.shape != target.shape:
            raise StateError(
                f"{path[0]}: {'.'.join(map(str, path[1:]))} was saved with shape "
                f"{list(saved.shape)} and has {list(target.shape)} now"
            )
        part = part_of(target, ".".join(map(str, path)))
        if part is None:
            raise StateError(f"{path[0]}: this rank is outside of the mesh of {path[1:]}")
        if isinstance(saved, ShardedValue):
            return dtensor_on(target, saved.piece(part))
        placed = dtensor_on(target, _narrow(saved.detach(), part.offsets, part.sizes).clone())
        self._keep(saved, placed)
        return placed


def _has_shape(value: Any, parameter: Any) -> bool:
    return parameter is not None and getattr(value, "shape", None) == parameter.shape
