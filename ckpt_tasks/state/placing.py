"""Saved state, placed as the live objects are: which block of what each of their tensors takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.blocks import Part, whole
from ckpt_tasks.state.modules import canonical_state_dict
from ckpt_tasks.state.resharding import ShardedValue, read_pieces
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.sharding import dtensor_on, is_dtensor, part_of

__all__ = ["place_all"]

_TreePath = tuple[object, ...]
_OnTensor = Callable[[Any, Any, _TreePath], Any]
"""Of a saved tensor, the DTensor that takes it or None, and its path: what stands in its place."""


def place_all(items: Mapping[str, tuple[Any, Any]], values: RestoredValues) -> dict[str, Any]:
    """The saved states of objects, their tensors placed as those of the live objects are.

    Parameters
    ----------
    items
        Tracked name to the live object and its saved state, from `restore_values`. A DTensor of
        the object takes this rank's part, whatever was saved; a plain tensor takes all of it.
    values
        All that was restored: told what of each saved plain tensor is needed, and what took its
        place.

    Raises
    ------
    StateError
        A saved tensor has another shape than the DTensor that takes it.
    CorruptCheckpointError
        The saved parts of a tensor do not make it up.
    """
    walks = {name: _Walk(name, item) for name, (item, _) in items.items()}
    pieces: list[tuple[ShardedValue, Part]] = []

    def want(saved: Any, target: Any, path: _TreePath) -> Any:
        if isinstance(saved, ShardedValue):
            pieces.append((saved, _block(saved, target, path)))
        elif not is_dtensor(saved):
            values.want(saved, _block(saved, target, path))
        return saved

    for name, (_, saved) in items.items():
        walks[name](saved, want)
    read_pieces(pieces)
    values.read_wanted()
    return {name: walks[name](saved, _Placer(values).tensor) for name, (_, saved) in items.items()}


class _Walk:
    """Goes through the saved state of one live object, and through what it has at each place."""

    def __init__(self, name: str, item: Any) -> None:
        self._name = name
        self._item = item
        self._live = _live_state(item)

    def __call__(self, saved: Any, on_tensor: _OnTensor) -> Any:
        """`saved`, each tensor replaced by what `on_tensor` gives; in place where it can be."""
        if isinstance(self._item, torch.optim.Optimizer):
            return self._optimizer(saved, on_tensor)
        return self._like(saved, self._live, (self._name,), on_tensor)

    def _like(self, saved: Any, live: Any, path: _TreePath, on_tensor: _OnTensor) -> Any:
        if isinstance(saved, ShardedValue | torch.Tensor):
            return on_tensor(saved, live if is_dtensor(live) else None, path)
        if isinstance(saved, dict):
            members = live if isinstance(live, dict) else {}
            for key, value in saved.items():
                saved[key] = self._like(value, members.get(key), (*path, key), on_tensor)
        elif isinstance(saved, list | tuple | deque):
            same = type(live) is type(saved) and len(live) == len(saved)
            placed = [
                self._like(value, live[number] if same else None, (*path, number), on_tensor)
                for number, value in enumerate(saved)
            ]
            if isinstance(saved, tuple):
                return tuple(placed)
            for number, value in enumerate(placed):
                saved[number] = value
        return saved

    def _optimizer(self, saved: Any, on_tensor: _OnTensor) -> Any:
        """Each parameter's state as the parameter is placed, where it has its shape."""
        if not isinstance(saved, dict) or not isinstance(saved.get("param_groups"), list):
            return saved  # what takes it says what is wrong
        groups = self._item.param_groups
        parameters = {
            number: parameter
            for group, saved_group in zip(groups, saved["param_groups"], strict=False)
            for parameter, number in zip(group["params"], saved_group["params"], strict=False)
        }
        for number, values in saved["state"].items():
            parameter = parameters.get(number)
            live = self._item.state.get(parameter, {}) if parameter is not None else {}
            for key, value in values.items() if isinstance(values, dict) else ():
                like = live.get(key)
                if like is None and _has_shape(value, parameter):
                    like = parameter
                path: _TreePath = (self._name, "state", number, key)
                values[key] = self._like(value, like, path, on_tensor)
        path = (self._name, "param_groups")
        saved["param_groups"] = self._like(saved["param_groups"], groups, path, on_tensor)
        return saved


def _live_state(item: Any) -> Any:
    if isinstance(item, torch.nn.Module):
        return canonical_state_dict(item)
    if isinstance(item, torch.optim.Optimizer) or not _is_distributed():
        return None
    return item.state_dict() if callable(getattr(item, "state_dict", None)) else None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Placer:
    """Makes the tensors of one object's state."""

    def __init__(self, values: RestoredValues) -> None:
        self._values = values
        self._placed: dict[object, Any] = {}

    def tensor(self, saved: Any, target: Any, path: _TreePath) -> Any:
        if isinstance(saved, torch.Tensor) and (target is None or is_dtensor(saved)):
            return saved
        # A tensor that stands in two places is one object in both.
        key = (id(saved), None if target is None else (target.device_mesh, target.placements))
        if key not in self._placed:
            self._placed[key] = self._new(saved, target, path)
        return self._placed[key]

    def _new(self, saved: Any, target: Any, path: _TreePath) -> Any:
        if target is None:
            return saved.whole()
        part = _block(saved, target, path)
        if isinstance(saved, ShardedValue):
            return dtensor_on(target, saved.piece(part))
        placed = dtensor_on(target, _narrow(saved.detach(), part).clone())
        self._values.keep(saved, placed)
        return placed


def _block(saved: Any, target: Any, path: _TreePath) -> Part:
    """What of a saved tensor its place takes."""
    if target is None:
        return whole(saved.shape)
    if saved.shape != target.shape:
        raise StateError(
            f"{path[0]}: {'.'.join(map(str, path[1:]))} was saved with shape "
            f"{list(saved.shape)} and has {list(target.shape)} now"
        )
    part = part_of(target, ".".join(map(str, path)))
    if part is None:
        raise StateError(f"{path[0]}: this rank is outside of the mesh of {path[1:]}")
    return part


def _narrow(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    for axis, (offset, length) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, length)
    return tensor


def _has_shape(value: Any, parameter: Any) -> bool:
    return parameter is not None and getattr(value, "shape", None) == parameter.shape
