"""Hyperparameters as records keep them: equal in every attempt that trains with the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckpt_tasks.masking import flatten_hyperparameters
from ckpt_tasks.types import Scalar

__all__ = [
    "all_hyperparameters",
    "changed_hyperparameters",
    "recorded_hyperparameters",
    "trained_with_others",
]

_MAX_SHOWN = 80  # characters of a value, in a sentence about it
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def recorded_hyperparameters(
    function: Callable[..., Any], params: Mapping[str, Any]
) -> dict[str, Scalar]:
    """What a checkpoint is told apart by: the defaults that hold, too; flattened and masked.

    Functions and classes are recorded by their qualified names, other objects by their `repr`
    without the addresses in it, and sets in order, so that nothing differs between attempts.
    """
    return flatten_hyperparameters(_stable(all_hyperparameters(function, params)))


def all_hyperparameters(function: Callable[..., Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and the defaults that hold, as they are."""
    _, *parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **params}


def changed_hyperparameters(
    before: Mapping[str, Scalar], today: Mapping[str, Scalar]
) -> str | None:
    """Which hyperparameters differ from the checkpoint's, and what that means for people.

    Parameters
    ----------
    before, today
        As `recorded_hyperparameters` gives them: masked.

    Returns
    -------
    str or None
        A sentence for each that differs, and one about what was restored; ``None`` where nothing
        differs.
    """
    changes = _changes(before, today)
    if not changes:
        return None
    return (
        f"hyperparameters differ from the checkpoint's: {'; '.join(changes)}. What was restored "
        "(optimizer, schedules) keeps the old value: set it after track() if the new one is meant"
    )


def trained_with_others(
    before: Mapping[str, Scalar], today: Mapping[str, Scalar], checkpoint: str | None
) -> str | None:
    """Which hyperparameters of a complete run differ from those asked for today, and what to do.

    Parameters
    ----------
    before, today
        As `recorded_hyperparameters` gives them: masked.
    checkpoint
        The run's last one.
    """
    changes = _changes(before, today)
    if not changes:
        return None
    train_on = f"--resume {checkpoint} trains on from its end, " if checkpoint else ""
    return (
        f"it was trained with other hyperparameters: {'; '.join(changes)}. To train with today's: "
        f"{train_on}--resume fresh from the beginning"
    )


def _changes(before: Mapping[str, Scalar], today: Mapping[str, Scalar]) -> list[str]:
    """A sentence for each that differs."""
    return [
        *(
            f"{name} was {_shown(before[name])} and is {_shown(value)} now"
            for name, value in today.items()
            if name in before and before[name] != value
        ),
        *(f"{name} is new: {_shown(today[name])}" for name in today if name not in before),
        *(f"{name} was {_shown(before[name])} and is gone" for name in before if name not in today),
    ]


def _shown(value: Scalar) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _stable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _stable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_stable(item) for item in value), key=repr)
    if isinstance(value, type) or inspect.isroutine(value):
        return _qualified_name(value)
    try:
        text = repr(value)
    except Exception:
        # A user's `__repr__` may want what exists during training only.
        return f"<{_qualified_name(type(value))}>"
    return _ADDRESS.sub("", text)


def _qualified_name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    name = str(getattr(value, "__qualname__", None) or _ADDRESS.sub("", repr(value)))
    return f"{module}.{name}" if module not in (None, "builtins") else name
