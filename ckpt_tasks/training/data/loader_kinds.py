"""Which loaders can be brought back to their position, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.capture import is_stateful
from ckpt_tasks.training.data.loaders import (
    LoaderState,
    ReplayedLoader,
    StatefulLoader,
    seeded_dataset,
)
from ckpt_tasks.training.data.resumable import ResumableLoader
from ckpt_tasks.training.data.samplers import ResumableDistributedSampler

__all__ = ["loader_state"]

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""They draw from a generator and keep no state."""

_IN_ORDER = (SequentialSampler, DistributedSampler, ResumableDistributedSampler)
"""Their order depends on nothing, or on an epoch that they are told."""


def loader_state(name: str, loader: Any, warn: Callable[[str], None]) -> LoaderState | None:
    """The state for a tracked object that is a loader; ``None`` if it is none.

    Parameters
    ----------
    warn
        Tells people what takes long.

    Raises
    ------
    StateError
        Its order cannot be reproduced; says why, and what to use.
    """
    if isinstance(loader, DataLoader):
        return _data_loader(name, loader, warn)
    is_loader = is_stateful(loader) and hasattr(loader, "__iter__")
    if not is_loader or isinstance(loader, torch.nn.Module | dict | list | tuple):
        return None
    return StatefulLoader(loader, exact=_is_exact(loader))


def _data_loader(name: str, loader: DataLoader[Any], warn: Callable[[str], None]) -> LoaderState:
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise StateError(
            f"tracked {name!r}: batches come in the order in which the workers finish them, which "
            "cannot be reproduced; make the loader with in_order=True"
        )
    sampler = _drawing_sampler(loader)
    if not is_stateful(loader):
        why = _irreproducible(loader)
        if why is None and type(sampler) is ResumableDistributedSampler:
            return ResumableLoader(loader, sampler)
        if why is not None:
            raise StateError(
                f"tracked {name!r}: the order of this DataLoader cannot be reproduced, as {why}; "
                "use torchdata.stateful_dataloader.StatefulDataLoader, a drop-in replacement"
            )
        return ReplayedLoader(loader, exact=_replays_exactly(loader), warn=warn)
    if type(sampler) is ResumableDistributedSampler:
        return ResumableLoader(loader, sampler)
    if isinstance(loader.dataset, IterableDataset) or _keeps_position(loader, sampler):
        return StatefulLoader(loader, exact=_is_exact(loader))
    if type(sampler) in _RANDOM or _is_torchdata(sampler):
        return ReplayedLoader(loader, exact=_replays_exactly(loader), warn=warn)
    raise StateError(
        f"tracked {name!r}: its {type(sampler).__name__} has neither state_dict() and "
        "load_state_dict() nor set_epoch(), so its order cannot be reproduced; give it the former"
    )


def _keeps_position(loader: DataLoader[Any], sampler: Any) -> bool:
    """Whether a ``StatefulDataLoader`` comes back to its place by its own state."""
    if is_stateful(sampler) or is_stateful(loader.batch_sampler):
        return True
    if type(sampler) in _IN_ORDER or hasattr(sampler, "set_epoch"):
        return True
    # Within torch's BatchSampler, torchdata skips batches without looking at the sampler's state.
    return _is_torchdata(sampler) and type(loader.batch_sampler) is not BatchSampler


def _is_torchdata(sampler: Any) -> bool:
    """Torchdata's ``RandomSampler``, which a ``StatefulDataLoader`` makes for ``shuffle=True``."""
    return type(sampler).__module__.startswith("torchdata.")


def _drawing_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler that makes the order: within a batch sampler that only groups."""
    outer: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    only_groups = type(outer) is BatchSampler or (
        isinstance(outer, BatchSampler) and _is_torchdata(outer)
    )
    return outer.sampler if only_groups else outer


def _irreproducible(loader: DataLoader[Any]) -> str | None:
    if isinstance(loader.dataset, IterableDataset):
        return "its data set is iterable"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{type(loader).__name__} has an __iter__ of its own"
    sampler = _drawing_sampler(loader)
    if type(sampler) not in _RANDOM + _IN_ORDER:
        return f"it draws from a {type(sampler).__name__}"
    return None


def _is_exact(loader: Any) -> bool:
    """Worker processes draw from generators of their own, which nobody can read."""
    if getattr(loader, "num_workers", 0) == 0 or seeded_dataset(loader) is not None:
        return True
    return hasattr(getattr(loader, "dataset", None), "state_dict")


def _replays_exactly(loader: DataLoader[Any]) -> bool:
    """Workers that start with the epoch draw the same numbers when it is replayed."""
    return not loader.persistent_workers or seeded_dataset(loader) is not None
