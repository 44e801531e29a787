"""Data position: which batches of the epoch have been seen, exactly.

Two kinds of loader can say so. torchdata's ``StatefulDataLoader`` has a state of its own. A
plain ``DataLoader`` has none, but where its order depends only on random generators, setting
those back and drawing the same batches again ends at the same place.

Creating an iterator draws from torch's global generator, so when it is done matters: see
`LoaderState.iterate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ckpt_tasks.errors import StateError
from ckpt_tasks.training.seeding import SeededDataset

__all__ = ["LoaderState", "ReplayedLoader", "StatefulLoader", "loader_state"]

_REPRODUCIBLE = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)


class LoaderState(ABC):
    """A tracked loader and its position; an object with ``state_dict/load_state_dict``.

    Parameters
    ----------
    loader
        The user's.
    exact
        Whether random numbers drawn while samples are made are restored too, not the order only.
    """

    kind: ClassVar[str]

    def __init__(self, loader: Any, *, exact: bool) -> None:
        self.loader = loader
        self.exact = exact
        self._finished = True
        self._pending: dict[str, Any] | None = None

    @abstractmethod
    def prepare(self, *, in_epoch: bool) -> None:
        """Bring a restored loader to its place as far as can be done before the loop begins.

        The caller sets the random generators afterwards, as this draws from them.
        """

    @abstractmethod
    def iterate(self, *, resuming: bool) -> Iterator[Any]:
        """A new iterator over the epoch; when `resuming`, over what is left of it.

        The caller sets the random generators after a resuming call, as this draws from them.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position between two batches."""

    def finish(self) -> None:
        """The iterator has been exhausted."""
        self._finished = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep `state` until `prepare` or `iterate`."""
        if state.get("kind") != self.kind:
            raise StateError(
                f"the loader was {state.get('kind')} when it was saved and is {self.kind} now "
                "(torchdata's StatefulDataLoader is 'stateful', a plain DataLoader is "
                "'replayed'); use the same kind, or start fresh"
            )
        self._pending = state
        self._finished = bool(state["finished"])


class StatefulLoader(LoaderState):
    """A loader that keeps its own position, such as torchdata's ``StatefulDataLoader``."""

    kind = "stateful"

    def prepare(self, *, in_epoch: bool) -> None:
        if in_epoch and _orders_by_epoch(self.loader):
            return  # The user's `set_epoch` has yet to be called; `iterate` comes after it.
        left_by_break = self._pending is not None and not self._finished
        self._materialise()
        if not in_epoch and left_by_break:
            # torchdata would go on inside the epoch that a `break` left. The iterator that it
            # hands out once for that is drawn and dropped, so that the next one starts anew.
            iter(self.loader)

    def iterate(self, *, resuming: bool) -> Iterator[Any]:
        if resuming:
            self._materialise()
        self._finished = False
        return iter(self.loader)

    def _materialise(self) -> None:
        """Load the state and make its iterator at once.

        Without this, torchdata makes two iterators in a row for a state saved at an epoch's end,
        and draws one number more from the global generator than the uninterrupted run did.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        _set_generators(self.loader, pending["generators"])
        if pending["state"] is not None:
            self.loader.load_state_dict(pending["state"])
            self.loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return self._pending
        # Asked before its first iterator, torchdata makes one, which draws a random number.
        begun = getattr(self.loader, "_iterator", self) is not None
        return {
            "kind": self.kind,
            "state": self.loader.state_dict() if begun else None,
            "finished": self._finished,
            "generators": [g.get_state() for g in _generators(self.loader)],
        }


class ReplayedLoader(LoaderState):
    """A plain ``DataLoader``: set its generators back, draw the same batches, go on."""

    kind = "replayed"

    def __init__(self, loader: DataLoader[Any], *, exact: bool) -> None:
        super().__init__(loader, exact=exact)
        self._drawn = 0
        self._start: dict[str, Any] = {"rng": None, "generators": []}

    def prepare(self, *, in_epoch: bool) -> None:
        if not in_epoch and self._pending is not None:
            _set_generators(self.loader, self._pending["generators"])
            self._pending = None

    def iterate(self, *, resuming: bool) -> Iterator[Any]:
        pending, self._pending = self._pending, None
        if resuming and pending is not None and pending["start"]["rng"] is not None:
            return self._replay(pending)
        if pending is not None:
            _set_generators(self.loader, pending["generators"])
        self._finished = False
        self._drawn = 0
        self._start = {
            "rng": torch.get_rng_state(),
            "generators": [g.get_state() for g in _generators(self.loader)],
        }
        return self._count(iter(self.loader))

    def _replay(self, pending: dict[str, Any]) -> Iterator[Any]:
        self._finished = False
        self._drawn = 0
        self._start = pending["start"]
        torch.set_rng_state(self._start["rng"])
        _set_generators(self.loader, self._start["generators"])
        iterator = self._count(iter(self.loader))
        for drawn in range(pending["drawn"]):
            if next(iterator, _END) is _END:
                raise StateError(
                    f"the loader ended after {drawn} of the {pending['drawn']} batches that were "
                    "seen before; its data or batch size has changed"
                )
        return iterator

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._drawn += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return self._pending
        return {
            "kind": self.kind,
            "drawn": self._drawn,
            "start": self._start,
            "finished": self._finished,
            "generators": [g.get_state() for g in _generators(self.loader)],
        }


_END = object()


def loader_state(name: str, loader: Any) -> LoaderState | None:
    """The state for a tracked object that is a loader; ``None`` if it is none.

    Raises `StateError` for a ``DataLoader`` whose order cannot be reproduced.
    """
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    if stateful and hasattr(loader, "__iter__") and not isinstance(loader, torch.nn.Module):
        if isinstance(loader, dict | list | tuple):
            return None
        return StatefulLoader(loader, exact=_is_exact(loader))
    if not isinstance(loader, DataLoader):
        return None
    why = _irreproducible(loader)
    if why is not None:
        raise StateError(
            f"tracked {name!r}: the order of this DataLoader cannot be reproduced, as {why}; use "
            "torchdata.stateful_dataloader.StatefulDataLoader instead, a drop-in replacement"
        )
    return ReplayedLoader(loader, exact=True)


def _irreproducible(loader: DataLoader[Any]) -> str | None:
    if isinstance(loader.dataset, IterableDataset):
        return "its data set is iterable"
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) not in _REPRODUCIBLE:
        return f"it draws from a {type(sampler).__name__}"
    return None


def _orders_by_epoch(loader: Any) -> bool:
    return any(
        hasattr(getattr(loader, name, None), "set_epoch") for name in ("sampler", "batch_sampler")
    )


def _is_exact(loader: Any) -> bool:
    """Worker processes draw from generators of their own, which nobody can read."""
    dataset = getattr(loader, "dataset", None)
    return (
        getattr(loader, "num_workers", 0) == 0
        or isinstance(dataset, SeededDataset)
        or hasattr(dataset, "state_dict")
    )


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that belong to the loader and its samplers, each once."""
    sampler: Sampler[Any] | None = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found


def _set_generators(loader: Any, states: list[torch.Tensor]) -> None:
    generators = _generators(loader)
    if len(generators) != len(states):
        raise StateError(
            f"the loader had {len(states)} random generators of its own when it was saved and has "
            f"{len(generators)} now; make it the same way"
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
