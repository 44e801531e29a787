"""The two loops: what is yielded, where boundaries lie, and where a resume returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.data.loaders import LoaderState
from ckpt_tasks.training.data.tracked_loaders import TrackedLoaders
from ckpt_tasks.training.reporter import Reporter
from ckpt_tasks.training.rewind import Rewind
from ckpt_tasks.training.saver import Saver

__all__ = ["Loops"]

_END = object()


class Loops:
    """Iterates for `TrainingRun.epochs` and `TrainingRun.steps`, which state the rules."""

    def __init__(
        self,
        counters: Counters,
        loaders: TrackedLoaders,
        saver: Saver,
        rewind: Rewind,
        reporter: Reporter,
    ) -> None:
        self._counters = counters
        self._loaders = loaders
        self._saver = saver
        self._rewind = rewind
        self._reporter = reporter
        self._stepping: object | None = None
        self._stepped_epoch: int | None = None
        self.inside_epochs = False
        """The loop over epochs is under way."""
        self.epochs_ended = False
        """It has ended by itself, so its end is saved or need not be."""

    @property
    def inside_steps(self) -> bool:
        """The loop over steps is under way."""
        return self._stepping is not None

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are still to be done. Raises `ConfigError` at once when nested."""
        self._check_use_of_epochs()
        return self._iterate_epochs(total)

    def steps(self, state: LoaderState, accumulate: int) -> Iterator[Any]:
        """The batches of this epoch that have not been seen yet.

        Parameters
        ----------
        state
            Of the tracked loader.
        accumulate
            Micro-batches per step.

        Raises
        ------
        ConfigError
            At once: outside `epochs`, nested, or twice in one epoch; or the epoch's last
            micro-batch matters and cannot be known.
        """
        self._check_use_of_steps()
        last = _length(state, self._counters.batch, accumulate) if accumulate > 1 else 0
        return self._iterate_steps(state, accumulate, last)

    def _iterate_epochs(self, total: int) -> Iterator[int]:
        self._check_use_of_epochs()
        counters = self._counters
        self.inside_epochs = True
        self.epochs_ended = False
        self._reporter.epochs_total = total
        try:
            while counters.next_epoch() < total and not counters.is_over:
                between_epochs = counters.phase == "epoch_done"
                counters.begin_epoch()
                self._loaders.begin_epoch(counters.epoch)
                self._rewind.here(last=between_epochs)
                yield counters.epoch
                self._end_epoch(total)
            # If the checkpoint lies here, at the end of this very loop, the code behind it is
            # the first that has not run.
            ends_here = counters.phase == "epoch_done" and counters.next_epoch() == total
            self._rewind.here(last=ends_here or counters.is_over)
            self.epochs_ended = True
        finally:
            self.inside_epochs = False

    def _end_epoch(self, total: int) -> None:
        counters = self._counters
        self._rewind.end()
        self._stepping = None
        self._loaders.close()
        counters.end_epoch()
        last = counters.stopping or counters.epoch + 1 >= total
        self._saver.at_boundary("end" if last else "epoch", counters)

    def _iterate_steps(self, state: LoaderState, accumulate: int, last: int) -> Iterator[Any]:
        self._check_use_of_steps()
        counters = self._counters
        self._stepping = token = object()
        self._stepped_epoch = counters.epoch
        try:
            self._loaders.close(but=state)
            iterator = state.iterate()
            self._rewind.here(last=True)
            while not counters.stopping or counters.in_flight:
                batch = next(iterator, _END)
                if batch is _END:
                    state.is_open = False
                    return
                counters.batch += 1
                counters.completes_step = counters.batch % accumulate == 0 or counters.batch == last
                counters.in_flight = True
                yield batch
                if counters.completes_step:
                    counters.end_step()
                    self._saver.at_boundary("step", counters)
        finally:
            if self._stepping is token:
                self._stepping = None

    def _check_use_of_epochs(self) -> None:
        if self.inside_epochs:
            raise ConfigError("run.epochs() is in use already; it cannot be nested")

    def _check_use_of_steps(self) -> None:
        if not self.inside_epochs:
            raise ConfigError("run.steps() belongs inside: for epoch in run.epochs(n)")
        if self._stepping is not None:
            raise ConfigError("run.steps() is in use already; it cannot be nested")
        if self._stepped_epoch == self._counters.epoch:
            raise ConfigError(
                f"run.steps() was used twice in epoch {self._counters.epoch}; a position in the "
                "data is one number, so iterate one loader once an epoch"
            )


def _length(state: LoaderState, seen: int, accumulate: int) -> int:
    try:
        return state.length(seen)
    except TypeError as error:
        raise ConfigError(
            f"accumulate={accumulate} needs a loader with a length, or its last micro-batch "
            f"cannot be known: {error}"
        ) from error
