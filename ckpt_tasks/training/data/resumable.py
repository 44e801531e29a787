"""The data position of a loader with a `ResumableDistributedSampler`: samples, not batches.

What counts is what was yielded to the training. A loader's workers have fetched more by then, and
its sampler has given out more still; both are made anew behind the place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ckpt_tasks.errors import StateError
from ckpt_tasks.training.data.loaders import (
    LoaderState,
    generator_states,
    seeded_dataset,
    set_generators,
)
from ckpt_tasks.training.data.samplers import ResumableDistributedSampler

__all__ = ["ResumableLoader"]


class ResumableLoader(LoaderState):
    """A loader, of whatever kind, whose order is made by a `ResumableDistributedSampler`.

    Its state says nothing of a rank, so that any number of ranks takes it.
    """

    kind = "resumable"
    goes_on_by_hand = False

    def __init__(self, loader: DataLoader[Any], sampler: ResumableDistributedSampler) -> None:
        # Random numbers of workers are those of the process that starts them.
        exact = loader.num_workers == 0 or seeded_dataset(loader) is not None
        super().__init__(loader, exact=exact)
        self._sampler = sampler
        self._drawn = 0

    def state_dict(self) -> dict[str, Any]:
        if self._pending is not None:
            return self._pending
        dataset = seeded_dataset(self.loader)
        return {
            "kind": self.kind,
            "open": self.is_open,
            "in_midst": self.is_open,
            "order": self._sampler.describe(),
            "epoch": self._sampler.epoch,
            "consumed": self._consumed() if self.is_open else 0,
            "generators": generator_states(self.loader),
            "dataset_epoch": None if dataset is None else dataset.epoch,
            "workers": self._has_workers(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `LoaderState`; batch size and number of ranks may be others than before."""
        self.check_kind(state)
        self._pending = state
        self.is_open = state["open"]

    def check_data(self) -> None:
        """In an epoch's midst, the order must be the one that was saved."""
        pending = self._pending
        today = self._sampler.describe()
        if pending is None or not self.is_open or pending["order"] == today:
            return
        before = pending["order"]
        changes = "; ".join(
            f"{key} was {before[key]}, is {today[key]}"
            for key in today
            if before[key] != today[key]
        )
        raise StateError(
            "the checkpoint lies in the midst of an epoch, whose order has changed since, so that "
            f"nobody can tell what is left of it ({changes}). Take the old values, or go on from a "
            "checkpoint at an epoch's end with --resume ID; `ckpt-tasks ls` lists them"
        )

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self._sampler.set_epoch(epoch)

    def prepare(self) -> None:
        pending = self._pending
        if pending is None:
            return
        dataset = seeded_dataset(self.loader)
        if dataset is not None and pending["dataset_epoch"] is not None:
            dataset.set_epoch(pending["dataset_epoch"])
        self._sampler.set_epoch(pending["epoch"])
        if not self.is_open:
            self._pending = None
            self._make_workers(pending)
            set_generators(self.loader, pending["generators"])

    def iterate(self) -> Iterator[Any]:
        self.check_data()
        pending, self._pending = self._pending, None
        self._sampler.consumed = 0
        if pending is not None:
            self._sampler.epoch = pending["epoch"]
            self._sampler.consumed = pending["consumed"]
            self._make_workers(pending)
        self.is_open = True
        self._drawn = 0
        iterator = iter(self.loader)
        if pending is not None:
            # Last, as making an iterator draws from the loader's own generators too.
            set_generators(self.loader, pending["generators"])
        return self._count(iterator)

    def length(self, seen: int) -> int:
        if self._pending is None or not self.is_open:
            return len(self.loader)
        self._sampler.epoch = self._pending["epoch"]
        self._sampler.consumed = self._pending["consumed"]
        left, size = self._sampler.left(), self._batch_size
        cut = getattr(self.loader.batch_sampler, "drop_last", False)
        return seen + (left // size if cut else -(-left // size))

    def _make_workers(self, then: dict[str, Any]) -> None:
        """Have what persistent workers keep between epochs, as `ReplayedLoader` does."""
        if then["workers"] and not self._has_workers():
            iter(self.loader)

    def _has_workers(self) -> bool:
        return self.loader.persistent_workers and self.loader._iterator is not None

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._drawn += 1
            yield batch

    def _consumed(self) -> int:
        return self._sampler.seen(self._drawn * self._batch_size)

    @property
    def _batch_size(self) -> int:
        return getattr(self.loader.batch_sampler, "batch_size", None) or 1

    def _own_state(self) -> dict[str, Any]:
        raise NotImplementedError("its state is made as a whole")
