"""Data position: which batches of the epoch have been seen, exactly.

Two kinds of loader can say so. torchdata's ``StatefulDataLoader`` has a state of its own. A
plain ``DataLoader`` has none, but where its order depends only on random generators, setting
those back and drawing the same batches again ends at the same place.

Creating an iterator draws from torch's global generator, so when it is done matters: see
`LoaderState.iterate`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Subset

from ckpt_tasks.errors import StateError
from ckpt_tasks.training.data.loader_data import check_same_data, describe_data
from ckpt_tasks.training.data.seeding import SeededDataset

__all__ = [
    "LoaderState",
    "ReplayedLoader",
    "StatefulLoader",
    "generator_states",
    "seeded_dataset",
    "set_generators",
]

_SILENT_SECONDS = 1.0  # for drawing again, before it is told
_END = object()


class LoaderState(ABC):
    """A tracked loader and its position; an object with ``state_dict/load_state_dict``.

    A loader is *open* while its iterator is the one that training goes on with. Otherwise, in
    whatever place its last iterator was left, the next one starts anew.

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
        self.is_open = False
        self._pending: dict[str, Any] | None = None
        self._saved_data: dict[str, Any] | None = None

    @property
    @abstractmethod
    def goes_on_by_hand(self) -> bool:
        """Whether ``iter(loader)``, called by the user, goes on where the state was saved."""

    @abstractmethod
    def prepare(self) -> None:
        """Bring a restored loader to its place as far as can be done before the loop begins.

        The caller sets the random generators afterwards, as this draws from them.
        """

    @abstractmethod
    def iterate(self) -> Iterator[Any]:
        """A new iterator over the epoch; after a restore in its midst, over what is left of it.

        The caller sets the random generators after a resuming call, as this draws from them.
        """

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What the subclass adds to `state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """The position between two batches."""
        if self._pending is not None:
            return self._pending
        dataset = seeded_dataset(self.loader)
        return {
            "kind": self.kind,
            "open": self.is_open,
            "data": describe_data(self.loader),
            "in_midst": self._is_in_midst,
            "generators": generator_states(self.loader),
            "sampler_epochs": [known_epoch(sampler) for sampler in epoch_samplers(self.loader)],
            "dataset_epoch": None if dataset is None else dataset.epoch,
            **self._own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep `state` until `prepare` or `iterate`.

        Raises `StateError` where it lies in the midst of an epoch of another kind of loader, or
        of one whose data are cut in another way.
        """
        self.check_kind(state)
        if state["in_midst"]:
            check_same_data(state["data"], self.loader, with_length=False)
            self._saved_data = state["data"]
        self._pending = state
        self.is_open = state["open"]

    def begin_epoch(self, epoch: int) -> None:
        """Tell a seeded data set the epoch."""
        dataset = seeded_dataset(self.loader)
        if dataset is not None:
            dataset.set_epoch(epoch)

    def check_kind(self, state: dict[str, Any]) -> None:
        """Raise `StateError` for the state of another kind of loader."""
        if state.get("kind") != self.kind:
            raise StateError(
                f"the loader was {state.get('kind')} when it was saved and is {self.kind} now: "
                "'stateful' is torchdata's StatefulDataLoader, 'replayed' a plain DataLoader, or "
                "any with a random sampler of torch's, 'resumable' any with a "
                "ResumableDistributedSampler; make it the same way, or start fresh"
            )

    def length(self, seen: int) -> int:
        """Batches of the epoch in all, `seen` of which lie before a place that was restored.

        Raises ``TypeError`` where the loader has no length.
        """
        return len(self.loader)

    def check_data(self) -> None:
        """Training goes on with this loader: in an epoch's midst, only on the same data.

        Raises `StateError` where a restored place was one in a data set of another length.
        """
        before, self._saved_data = self._saved_data, None
        if before is not None and self.is_open:
            check_same_data(before, self.loader, with_length=True)

    @property
    def _is_in_midst(self) -> bool:
        """Whether some of an epoch has been seen, and some may be left."""
        return self.is_open

    def _restore_epochs(self, state: dict[str, Any]) -> None:
        for sampler, epoch in zip(
            epoch_samplers(self.loader), state["sampler_epochs"], strict=False
        ):
            if epoch is not None:
                sampler.set_epoch(epoch)
        dataset = seeded_dataset(self.loader)
        if dataset is not None and state["dataset_epoch"] is not None:
            # Before any worker is started: it fetches samples at once.
            dataset.set_epoch(state["dataset_epoch"])


class StatefulLoader(LoaderState):
    """A loader that keeps its own position, such as torchdata's ``StatefulDataLoader``."""

    kind = "stateful"

    @property
    def goes_on_by_hand(self) -> bool:
        return not self._waits_for_set_epoch()

    def prepare(self) -> None:
        if self._pending is None:
            return
        self._restore_epochs(self._pending)
        if self.is_open and self._waits_for_set_epoch():
            return  # `iterate` is called when the user has told the sampler its epoch.
        self._materialise()

    def iterate(self) -> Iterator[Any]:
        self.check_data()
        self._materialise()
        self.is_open = True
        return iter(self.loader)

    def _waits_for_set_epoch(self) -> bool:
        return any(known_epoch(sampler) is None for sampler in epoch_samplers(self.loader))

    def _materialise(self) -> None:
        """Load the state and make its iterator at once.

        Without this, torchdata makes two iterators in a row for a state saved at an epoch's end,
        and draws one number more from the global generator than the uninterrupted run did.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending["state"] is not None and not self._has_shrunk(pending):
            self._load(pending["state"])
            if not self.is_open and _is_unfinished(self.loader):
                # torchdata would go on inside the epoch that was left. The iterator that it
                # hands out once for that is taken and dropped, so that the next starts anew.
                iter(self.loader)
        # Last, as making an iterator draws from the loader's own generators too.
        set_generators(self.loader, pending["generators"])

    def _has_shrunk(self, pending: dict[str, Any]) -> bool:
        """At an epoch's end torchdata would skip to the end of the old data, beyond today's."""
        before, today = pending["data"]["samples"], describe_data(self.loader)["samples"]
        return not pending["in_midst"] and (today or 0) < (before or 0)

    def _load(self, state: Any) -> None:
        try:
            self.loader.load_state_dict(state)
            self.loader.state_dict()
        except Exception:
            self.check_data()  # whose words say more than a loader that ran out of data
            raise

    @property
    def _is_begun(self) -> bool:
        return getattr(self.loader, "_iterator", self) is not None

    @property
    def _is_in_midst(self) -> bool:
        # Iterated by hand, a loader stays open when its epoch has ended.
        iterator = getattr(self.loader, "_iterator", None)
        return self.is_open and self._is_begun and not getattr(iterator, "_finished", False)

    def _own_state(self) -> dict[str, Any]:
        # Asked before its first iterator, torchdata makes one, which draws a random number.
        return {"state": self.loader.state_dict() if self._is_begun else None}


class ReplayedLoader(LoaderState):
    """A ``DataLoader`` whose order depends on generators only.

    They are set back, the same batches are drawn again, and the next one is the next unseen.

    Parameters
    ----------
    warn
        Told once that drawing again takes long.
    clock
        Seconds, monotonic.
    """

    kind = "replayed"
    goes_on_by_hand = False

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        exact: bool,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(loader, exact=exact)
        self._warn = warn
        self._clock = clock
        self._drawn = 0
        self._start = self._moment()

    def prepare(self) -> None:
        pending = self._pending
        if pending is None:
            return
        self._restore_epochs(pending)
        if self.is_open:
            return  # Replayed by `iterate`, when the user has told the sampler its epoch.
        self._pending = None
        self._make_workers(pending)
        set_generators(self.loader, pending["generators"])

    def iterate(self) -> Iterator[Any]:
        self.check_data()
        pending, self._pending = self._pending, None
        if pending is not None:
            return self._replay(pending)
        self.is_open = True
        self._drawn = 0
        self._start = self._moment()
        return self._count(iter(self.loader))

    def _replay(self, pending: dict[str, Any]) -> Iterator[Any]:
        self._drawn = 0
        self._start = pending["start"]
        self._make_workers(self._start)
        torch.set_rng_state(self._start["rng"])
        set_generators(self.loader, self._start["generators"])
        iterator = self._count(iter(self.loader))
        self._draw_again(iterator, pending["drawn"])
        return iterator

    def _draw_again(self, iterator: Iterator[Any], seen: int) -> None:
        silent_until: float | None = self._clock() + _SILENT_SECONDS
        for drawn in range(seen):
            if drawn and silent_until is not None and self._clock() >= silent_until:
                silent_until = None
                self._warn(
                    f"drawing the {seen} batches again that were seen in this epoch, {drawn} so "
                    "far: a DataLoader that keeps no position finds its place in no other way. "
                    "torchdata's StatefulDataLoader, in order or with shuffle=True, goes there "
                    "without making the samples"
                )
            if next(iterator, _END) is _END:
                raise StateError(
                    f"the loader ended after {drawn} of the {seen} batches that were seen before; "
                    "its data or batch size has changed"
                )

    def _make_workers(self, then: dict[str, Any]) -> None:
        """Have what persistent workers keep between epochs: the first iterator is made once.

        It draws a number that later ones do not draw.
        """
        if then["workers"] and not self._has_workers():
            iter(self.loader)

    def _has_workers(self) -> bool:
        return self.loader.persistent_workers and self.loader._iterator is not None

    def _moment(self) -> dict[str, Any]:
        return {
            "rng": torch.get_rng_state(),
            "generators": generator_states(self.loader),
            "workers": self._has_workers(),
        }

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._drawn += 1
            yield batch

    def _own_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "start": self._start, "workers": self._has_workers()}


def seeded_dataset(loader: Any) -> SeededDataset | None:
    """The `SeededDataset` that a loader reads, also through subsets of it."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, SeededDataset) else None


def epoch_samplers(loader: Any) -> list[Any]:
    """The loader's samplers that are told the epoch."""
    return [sampler for sampler in _samplers(loader) if hasattr(sampler, "set_epoch")]


def known_epoch(sampler: Any) -> int | None:
    """The epoch that a sampler was told, if it shows it as torch's ``DistributedSampler``."""
    epoch = getattr(sampler, "epoch", None)
    return epoch if type(epoch) is int else None


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found: list[Any] = []
    for sampler in (
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ):
        if sampler is not None and all(sampler is not other for other in found):
            found.append(sampler)
    return found


def _is_unfinished(loader: Any) -> bool:
    iterator = getattr(loader, "_iterator", None)
    return iterator is not None and not getattr(iterator, "_finished", True)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that belong to the loader and its samplers, each once."""
    found: list[torch.Generator] = []
    for owner in (loader, *_samplers(loader)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found


def generator_states(loader: Any) -> list[torch.Tensor]:
    """States of the generators that belong to the loader and its samplers."""
    return [generator.get_state() for generator in _generators(loader)]


def set_generators(loader: Any, states: list[torch.Tensor]) -> None:
    """Inverse of `generator_states`; raises `StateError` where it has another number of them."""
    generators = _generators(loader)
    if len(generators) != len(states):
        raise StateError(
            f"the loader had {len(states)} random generators of its own when it was saved and has "
            f"{len(generators)} now; make it the same way"
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
