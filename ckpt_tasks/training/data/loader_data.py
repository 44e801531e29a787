"""What a place in the midst of an epoch depends on: the loader's data, and how it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from ckpt_tasks.errors import StateError

__all__ = ["check_same_data", "describe_data"]

_WORDS = {
    "batch_size": "batch size",
    "drop_last": "drop_last",
    "sampler": "sampler",
    "samples": "number of samples",
}


def describe_data(loader: Any) -> dict[str, Any]:
    """Batch size, drop_last, the sampler's class and the data set's length.

    Each is ``None`` where the loader does not show it; an iterable data set has no length, or
    one that is an estimate.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    cuts = loader if batch_sampler is None else batch_sampler
    sampler = getattr(cuts, "sampler", cuts)
    return {
        "batch_size": _plain(getattr(cuts, "batch_size", None), int),
        "drop_last": _plain(getattr(cuts, "drop_last", None), bool),
        "sampler": None if sampler is loader else type(sampler).__name__,
        "samples": _length(getattr(loader, "dataset", None)),
    }


def check_same_data(before: Mapping[str, Any], loader: Any, *, with_length: bool) -> None:
    """Refuse to go on at a place that means another one in today's data.

    Parameters
    ----------
    before
        From `describe_data`, when the place was saved.
    with_length
        Also compare the number of samples, which may still change until the epoch begins.

    Raises
    ------
    StateError
        Names what differs, with both values.
    """
    today = describe_data(loader)
    differs = [name for name in _WORDS if before[name] != today[name]]
    if not differs or (differs == ["samples"] and not with_length):
        return
    changes = "; ".join(f"{_WORDS[name]} was {before[name]}, is {today[name]}" for name in differs)
    raise StateError(
        "the checkpoint lies in the midst of an epoch, and the loader has changed since, so its "
        f"place in the data cannot be found ({changes}). Take the old values, or go on from a "
        "checkpoint at an epoch's end with --resume ID; `ckpt-tasks ls` lists them"
    )


def _plain(value: Any, kind: type) -> Any:
    return value if type(value) is kind else None


def _length(dataset: Any) -> int | None:
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
