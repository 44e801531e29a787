"""The objects a training run tracks: added by name, captured together, restored by name."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.capture import CapturedState, capture, is_stateful
from ckpt_tasks.state.linking import Linker
from ckpt_tasks.state.modules import load_module
from ckpt_tasks.state.optimizers import load_optimizer
from ckpt_tasks.state.placing import place_all
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.row_blocks import RowSplitter

__all__ = ["RESERVED_PREFIX", "TrackedItems"]

RESERVED_PREFIX = "ckpt_tasks"
"""Names that begin with it belong to this package: counters, random number generators."""

_IN_PLACE = (dict, OrderedDict, Counter, list, deque)
_LOAD_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TrackedItems:
    """Tracked names and their objects, in the order in which they were added.

    Parameters
    ----------
    row_blocks
        Tensors that are captured in blocks of rows; see `state.row_blocks`.
    """

    def __init__(self, row_blocks: Sequence[str] = ()) -> None:
        self._items: dict[str, Any] = {}
        self._splitter = RowSplitter(row_blocks)

    @property
    def names(self) -> list[str]:
        """Tracked names, in order."""
        return list(self._items)

    def add(self, name: str, item: Any) -> None:
        """Track an object. It is captured once, to refuse early what cannot be saved.

        Parameters
        ----------
        name
            Unique among the tracked ones.
        item
            An object with ``state_dict`` and ``load_state_dict``, or a dict, list, deque or
            tensor of plain values, which is restored in place.

        Raises
        ------
        StateError
            A name that is taken, reserved or empty, or state that cannot be represented; names
            key and type.
        """
        self._check_name(name)
        _check_restorable(name, item)
        capture({name: item})
        self._items[name] = item

    def capture(self, own: Mapping[str, Any] | None = None) -> CapturedState:
        """Capture all tracked objects, and this package's `own` under reserved names.

        Raises
        ------
        StateError
            State made since it was added that cannot be represented.
        ConfigError
            Of the `row_blocks`, one is no tensor, or one that cannot be split.
        """
        captured = capture({**self._items, **(own or {})}, self._splitter)
        self._splitter.check_matched(
            [
                name
                for name, item in self._items.items()
                if isinstance(item, torch.optim.Optimizer) and not item.state
            ]
        )
        return captured

    def optimizers(self, rename: Mapping[str, str | None]) -> set[str]:
        """Saved names that optimizers take, with `rename` as of `restore`."""
        own = {name: name for name in self._items if name not in rename.values()}
        taken_by: dict[str, str | None] = {**own, **rename}
        return {
            name
            for name, taker in taken_by.items()
            if isinstance(self._items.get(taker or ""), torch.optim.Optimizer)
        }

    def restore(
        self,
        values: Mapping[str, Any],
        *,
        rename: Mapping[str, str | None] | None = None,
        fresh: Collection[str] = (),
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Give each tracked object its saved state.

        Parameters
        ----------
        values
            Saved name to state, from `restore_values`. Reserved names that are not in `own` are
            passed over.
        rename
            Saved name to the tracked name that takes it, or to ``None`` to leave it out.
        fresh
            Tracked names that keep their present state, having none saved.
        own
            This package's own plain values under reserved names, restored in place as well.

        Raises
        ------
        StateError
            Saved and tracked names that do not match, or state that does not fit its object;
            names both sides. Names are checked before anything is changed.
        """
        saved = self._matched(values, rename or {}, fresh)
        known = values if isinstance(values, RestoredValues) else RestoredValues()
        saved = place_all({n: (self._items[n], value) for n, value in saved.items()}, known)
        stateful = [name for name in saved if is_stateful(self._items[name])]
        for name in sorted(stateful, key=self._loading_order):
            _load(name, self._items[name], saved[name])
        link = Linker(values, {name: (self._items[name], saved[name]) for name in stateful})
        plain = {name: item for name, item in self._items.items() if name not in stateful}
        for name, item in (own or {}).items():
            plain[name], saved[name] = item, values[name]
        for name, item in plain.items():
            if name in saved:
                _fill(name, item, link(saved[name]))

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise StateError(f"an object is tracked under a name, not {name!r}")
        if name.startswith(RESERVED_PREFIX):
            raise StateError(f"names that begin with {RESERVED_PREFIX!r} are reserved, as {name!r}")
        if name in self._items:
            raise StateError(f"{name!r} is tracked already; give each object a name of its own")

    def _matched(
        self,
        values: Mapping[str, Any],
        rename: Mapping[str, str | None],
        fresh: Collection[str],
    ) -> dict[str, Any]:
        """Tracked name to saved state, if the two sides match."""
        saved_names = [name for name in values if not name.startswith(RESERVED_PREFIX)]
        pairs = [(rename.get(name, name), name) for name in saved_names]
        matched = {target: values[name] for target, name in pairs if target is not None}
        unknown = sorted((rename.keys() - values.keys()) | (set(fresh) - self._items.keys()))
        if unknown:
            raise StateError(f"mapped names that are neither saved nor tracked: {unknown}")
        if len(matched) < sum(target is not None for target, _ in pairs):
            raise StateError(f"two saved names are mapped to one: {dict(rename)}")
        missing = sorted(self._items.keys() - matched.keys() - set(fresh))
        extra = sorted(matched.keys() - self._items.keys())
        if missing or extra:
            raise StateError(
                f"the checkpoint holds {sorted(saved_names)} and the run tracks "
                f"{sorted(self._items)}: without saved state: {missing or 'none'}, "
                f"without a tracked object: {extra or 'none'}; track the same names, or say what "
                "changed: track(rename={'saved name': 'name today'}, fresh=['new name'])"
            )
        return matched

    def _loading_order(self, name: str) -> int:
        """Modules, then optimizers, then what may look at either."""
        item = self._items[name]
        if isinstance(item, torch.nn.Module):
            return 0
        return 1 if isinstance(item, torch.optim.Optimizer) else 2


def _check_restorable(name: str, item: Any) -> None:
    if is_stateful(item) or type(item) in _IN_PLACE or isinstance(item, torch.Tensor):
        return
    kind = f"{type(item).__module__}.{type(item).__qualname__}"
    if isinstance(item, type):
        raise StateError(f"{name!r} is the class {item.__qualname__}; track an object of it")
    raise StateError(
        f"{name!r} is a {kind}, which can be restored neither by load_state_dict() nor in place; "
        "give it state_dict() and load_state_dict(), or put the value into a tracked dict"
    )


def _load(name: str, item: Any, state: Any) -> None:
    if isinstance(item, torch.nn.Module):
        load_module(name, item, state)
    elif isinstance(item, torch.optim.Optimizer):
        load_optimizer(name, item, state)
    else:
        try:
            item.load_state_dict(state)
        except StateError as error:
            raise StateError(f"{name}: {error}") from error
        except _LOAD_ERRORS as error:
            raise StateError(
                f"{name}: {type(item).__qualname__}.load_state_dict refuses the saved state: "
                f"{type(error).__name__}: {error}"
            ) from error


def _fill(name: str, target: Any, value: Any) -> None:
    """Give a plain value its saved content, as the same object."""
    if isinstance(target, torch.Tensor):
        _fill_tensor(name, target, value)
        return
    if type(value) is not type(target):
        raise StateError(
            f"{name} is a {type(target).__name__}, but a {type(value).__name__} was saved under it"
        )
    target.clear()
    if isinstance(target, dict):
        target.update(value)
    else:
        target.extend(value)


def _fill_tensor(name: str, target: torch.Tensor, value: Any) -> None:
    saved = value if isinstance(value, torch.Tensor) else None
    if saved is None or saved.shape != target.shape or saved.dtype is not target.dtype:
        what = type(value).__name__ if saved is None else f"{saved.dtype} {list(saved.shape)}"
        raise StateError(
            f"{name} is a tensor of {target.dtype} {list(target.shape)}, but {what} was saved "
            "under it"
        )
    with torch.no_grad():
        target.copy_(saved)
