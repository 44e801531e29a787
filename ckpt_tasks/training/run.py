"""`TrainingRun`: what the user's training function is given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.reader import LoadedCheckpoint
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, StateError
from ckpt_tasks.events import EventSink, discard_event
from ckpt_tasks.schedule.policy import SaveDecisionPolicy
from ckpt_tasks.state.capture import CapturedState, restore_values
from ckpt_tasks.state.rng import capture_rng, restore_rng
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.loaders import LoaderState, ReplayedLoader, loader_state
from ckpt_tasks.training.saver import Saver
from ckpt_tasks.training.seeding import SeededDataset
from ckpt_tasks.types import Position, Scalar

__all__ = ["TrainingRun"]

_COUNTERS, _RNG, _STATE = "ckpt_tasks.counters", "ckpt_tasks.rng", "ckpt_tasks.state"
_END = object()


class TrainingRun:
    """One logical training, however many attempts it takes.

    The training function calls `track` once, then loops over `epochs` and, inside, `steps`.
    After a crash the same function is called again, and the loops go on where the last
    checkpoint lies.

    **Boundaries.** State is saved at two kinds of places only. A *step* is done when `steps` is
    asked for the next batch; the save precedes that fetch. An *epoch* is done when `epochs` is
    asked for the next one; the save lies behind the code that follows the inner loop. Every
    trigger waits for the next boundary. A save after an epoch's last batch lies before that
    code: on resume the inner loop yields nothing, and the code runs.

    **Leaving early.** A generator cannot tell ``break``, ``return`` and an exception apart, and
    a half-done step is torn, so nothing is saved when the inner loop is left early until the
    epoch's boundary, which counts the step in flight as done. After an exception nothing is
    captured. ``continue`` is an ordinary end of a step. `stop` ends both loops at the next
    boundary and is remembered by checkpoints; prefer it to a ``break`` out of `epochs`.

    **Random numbers.** The global generators of python, numpy and torch are restored last: when
    the first resumed iterator exists (making it draws), before its first batch is fetched. Code
    between the head of the epoch loop and the inner loop runs again when an epoch is resumed
    midway. Nothing here draws from the global generators, and nothing changes the training.

    **Iterators.** `steps` takes the tracked loader itself and is the outermost iterator:
    ``tqdm(run.steps(loader))``, not the reverse. Nested, repeated or untracked use raises.

    Parameters
    ----------
    name, attempt
        Of the run, and the number of this execution of it.
    start
        The verified checkpoint to go on from; ``None`` starts at the beginning.
    schedule
        Decides when to save.
    hyperparameters
        Flattened and masked.
    max_unprotected
        Seconds without a checkpoint, while saves fail, after which training fails.
    """

    def __init__(
        self,
        *,
        name: str,
        attempt: int,
        checkpointer: Checkpointer,
        schedule: SaveDecisionPolicy,
        start: LoadedCheckpoint | None = None,
        hyperparameters: Mapping[str, Scalar] | None = None,
        max_unprotected: float = 1800.0,
        on_event: EventSink = discard_event,
    ) -> None:
        self.name = name
        self.attempt = attempt
        self.hyperparameters = dict(hyperparameters or {})
        self.state: dict[str, Any] = {}
        """The loop's own variables (best, patience, ...): tracked, and restored in place."""
        self.resumed_from = start.record.id if start else None
        """Id of the checkpoint that this attempt started from."""
        self._start = start
        self._items = TrackedItems()
        self._loaders: dict[int, LoaderState] = {}
        self._rng: dict[str, Any] | None = None
        self._tracked = False
        self._inside_epochs = False
        self._stepping: object | None = None
        self._stepped_epoch: int | None = None
        self._counters = Counters()
        if start is not None:
            self._counters = Counters.from_dict(_restored(start, [_COUNTERS])[_COUNTERS])
        self._saver = Saver(
            name,
            checkpointer=checkpointer,
            schedule=schedule,
            capture=self._capture,
            exact=self._is_exact,
            on_event=on_event,
            start=start.record if start else None,
            max_unprotected=max_unprotected,
        )

    @property
    def step(self) -> int:
        """Steps done. Inside the n-th step, counted from 1, it is n - 1."""
        return self._counters.step

    @property
    def epoch(self) -> int:
        """Index of the epoch under way, from 0."""
        return self._counters.epoch

    @property
    def position(self) -> Position:
        """Where the run is; right after a resume, before `track` too, where it was saved."""
        return self._counters.position

    @property
    def checkpoint(self) -> str | None:
        """Id of the newest checkpoint."""
        return self._saver.checkpoint

    @property
    def is_step_boundary(self) -> bool:
        """Whether the micro-batch in hand completes a step; True without accumulation."""
        return self._counters.completes_step

    def track(
        self,
        *,
        rename: Mapping[str, str | None] | None = None,
        fresh: Collection[str] = (),
        **items: Any,
    ) -> None:
        """Name everything that makes up the training's state, and restore it if there is any.

        Call it once, before the loops, with everything made. Accepts objects with
        ``state_dict/load_state_dict`` (modules, optimizers, schedulers, scalers, averaged
        models, stateful loaders, your own), a plain ``DataLoader`` whose order can be
        reproduced, and plain values. Random generators, counters and `state` are always
        included.

        Parameters
        ----------
        rename
            Saved name to today's name, for what has been renamed since; ``None`` leaves it out.
        fresh
            Names that did not exist when the checkpoint was saved and start as they are.
        **items
            Name to object.

        Raises
        ------
        StateError
            Something cannot be represented without pickle (names the key and the type), the
            names or shapes differ from the checkpoint's, or `track` is called twice or late.
        """
        if self._tracked:
            raise StateError("track() was called twice; name everything in one call")
        for name, item in items.items():
            loader = loader_state(name, item)
            if loader is not None:
                self._loaders[id(item)] = loader
            self._items.add(name, item if loader is None else loader)
        self._tracked = True
        if self._start is not None:
            self._restore(self._start, rename or {}, fresh)
        self._saver.restart_clock()

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the index of each epoch that is still to be done, up to `total`.

        Raises `ConfigError` before `track`, for nested use, or when `total` is negative.
        """
        self._need_tracked("epochs")
        if total < 0:
            raise ConfigError(f"epochs({total}): the number of epochs cannot be negative")
        if self._inside_epochs:
            raise ConfigError("run.epochs() is in use already; it cannot be nested")
        return self._iterate_epochs(total)

    def steps(self, loader: Any, *, accumulate: int = 1) -> Iterator[Any]:
        """Yield the batches of this epoch that have not been seen yet.

        Parameters
        ----------
        loader
            A tracked loader itself, not a wrapper around it.
        accumulate
            Micro-batches per step: boundaries lie only behind each `accumulate`-th and the
            last one. `is_step_boundary` tells when to call ``optimizer.step()``.

        Raises
        ------
        ConfigError
            `loader` is not tracked; use outside `epochs`, nested, or twice in one epoch.
        """
        self._need_tracked("steps")
        state = self._loaders.get(id(loader))
        if state is None:
            raise ConfigError(
                f"run.steps() was given a {type(loader).__name__} that is not tracked; pass the "
                "very loader that was passed to track(), and wrap the result: "
                "tqdm(run.steps(loader))"
            )
        if not self._inside_epochs:
            raise ConfigError("run.steps() belongs inside: for epoch in run.epochs(n)")
        if self._stepping is not None:
            raise ConfigError("run.steps() is in use already; it cannot be nested")
        if self._stepped_epoch == self.epoch:
            raise ConfigError(
                f"run.steps() was used twice in epoch {self.epoch}; a position in the data is "
                "one number, so iterate one loader once an epoch"
            )
        if accumulate < 1 or (accumulate > 1 and not hasattr(loader, "__len__")):
            raise ConfigError(
                f"accumulate={accumulate}: must be at least 1, and above 1 needs a loader with a "
                "length, or its last micro-batch cannot be known"
            )
        return self._iterate_steps(state, accumulate)

    def step_done(self) -> None:
        """For loops kept whole: say that a step is done. Saves if one is due.

        Raises `ConfigError` inside `steps`, which says so by itself.
        """
        self._need_tracked("step_done")
        if self._stepping is not None:
            raise ConfigError("step_done() was called inside run.steps(), which counts by itself")
        if any(isinstance(loader, ReplayedLoader) for loader in self._loaders.values()):
            raise ConfigError(
                "a plain DataLoader keeps no position when it is iterated by hand; use "
                "run.steps(loader), or torchdata's StatefulDataLoader"
            )
        self._rng = None
        self._counters.end_step()
        self._saver.at_boundary("step", self._counters)

    def save(self, reason: str = "asked for by the training code") -> None:
        """Save at the next boundary; in a loop kept whole (outside `epochs`), now."""
        self._need_tracked("save")
        self._saver.request_save(reason)
        if not self._inside_epochs:
            self._saver.at_boundary("step", self._counters)

    def stop(self) -> None:
        """End both loops at the next boundary. The epoch's last code still runs."""
        self._counters.stopping = True

    def log(self, values: Mapping[str, Any] | None = None, /, **metrics: Any) -> None:
        """Log metrics for the step under way: once per key and step, however many crashes.

        Inside the n-th step, counted from 1, and behind it, values belong to step n.

        Parameters
        ----------
        values
            For names that are no identifiers: ``{"val/accuracy": 0.9}``.
        **metrics
            Numbers or tensors of one element.
        """
        if values:
            self._saver.metrics.log(values)
        if metrics:
            self._saver.metrics.log(metrics)

    def request_stop(self, reason: str) -> None:
        """Ask, from any thread, for a save at the next boundary and an end of this attempt."""
        self._saver.request_stop(reason)

    def finish(self) -> None:
        """The training function has returned: save its end, unless that is saved already."""
        if not self._tracked:
            return
        if self._counters.position != self._saver.saved:
            # The loops were left by `break`, or kept by hand: a resume must not train further.
            self._counters.finished = True
            self._saver.at_boundary("end", self._counters)
        self._saver.flush(self.position)

    # -- the loops ----------------------------------------------------------------------------

    def _iterate_epochs(self, total: int) -> Iterator[int]:
        counters = self._counters
        self._inside_epochs = True
        self._saver.epochs_total = total
        try:
            while counters.next_epoch() < total and not self._is_over():
                between_epochs = counters.phase == "epoch_done"
                counters.begin_epoch()
                self._apply_rng(last=between_epochs)
                yield counters.epoch
                self._rng = None
                self._stepping = None
                counters.end_epoch()
                last = counters.stopping or counters.epoch + 1 >= total
                self._saver.at_boundary("end" if last else "epoch", counters)
        finally:
            self._inside_epochs = False

    def _is_over(self) -> bool:
        counters = self._counters
        return counters.finished or (counters.stopping and counters.phase == "epoch_done")

    def _iterate_steps(self, state: LoaderState, accumulate: int) -> Iterator[Any]:
        counters = self._counters
        self._stepping = token = object()
        self._stepped_epoch = counters.epoch
        last = len(state.loader) if accumulate > 1 else 0
        iterator = self._begin_iterator(state)
        try:
            while not counters.stopping or counters.in_flight:
                batch = next(iterator, _END)
                if batch is _END:
                    state.finish()
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

    def _begin_iterator(self, state: LoaderState) -> Iterator[Any]:
        dataset = getattr(state.loader, "dataset", None)
        if isinstance(dataset, SeededDataset):
            dataset.set_epoch(self.epoch)
        iterator = state.iterate(resuming=self._rng is not None)
        self._apply_rng(last=True)
        return iterator

    # -- state --------------------------------------------------------------------------------

    def _capture(self) -> CapturedState:
        own = {_COUNTERS: self._counters.to_dict(), _RNG: capture_rng(), _STATE: self.state}
        return self._items.capture(own)

    def _restore(
        self, start: LoadedCheckpoint, rename: Mapping[str, str | None], fresh: Collection[str]
    ) -> None:
        values = _restored(start)
        self._items.restore(values, rename=rename, fresh=fresh, own={_STATE: self.state})
        self._rng = values[_RNG]
        self._start = None  # its memory is not needed any more
        for loader in self._loaders.values():
            loader.prepare(in_epoch=self._counters.phase == "in_epoch")
        self._apply_rng(last=False)

    def _apply_rng(self, *, last: bool) -> None:
        """Set the generators back; again at each place that may be the last before training."""
        if self._rng is None:
            return
        for warning in restore_rng(self._rng):
            self._saver.warn_once(warning)
        if last:
            self._rng = None

    def _is_exact(self) -> bool:
        exact = all(loader.exact for loader in self._loaders.values())
        if not exact:
            self._saver.warn_once(
                "the loader's workers may draw random numbers that no checkpoint holds, so only "
                "the order of the data is restored exactly; wrap the data set in SeededDataset, "
                "or give it state_dict/load_state_dict"
            )
        return exact

    def _need_tracked(self, what: str) -> None:
        if not self._tracked:
            raise ConfigError(f"run.{what}() was called before run.track(...)")


def _restored(start: LoadedCheckpoint, names: list[str] | None = None) -> dict[str, Any]:
    """The saved values of all tracked names, or of `names`."""
    index = start.index
    trees = start.trees if names is None else {n: start.trees[n] for n in names if n in start.trees}
    missing = {_COUNTERS, _RNG, _STATE} - start.trees.keys()
    if missing:
        raise CorruptCheckpointError(f"{start.record.id} lacks {sorted(missing)}")

    def tensor_at(position: int) -> torch.Tensor:
        try:
            entry = index.tensors[position]
        except IndexError as error:
            raise CorruptCheckpointError(
                f"{start.record.id} refers to tensor {position} of {len(index.tensors)}"
            ) from error
        return tensor_from_buffer(start.tensors[position], entry.dtype, entry.shape)

    return restore_values(trees, tensor_at)
