"""`TrainingRun`: what the user's training function is given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.differing import differing
from ckpt_tasks.checkpointer.reader import LoadedCheckpoint
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint
from ckpt_tasks.checkpointer.staged import StagedState
from ckpt_tasks.errors import ConfigError, StateError
from ckpt_tasks.events import EventSink, discard_event
from ckpt_tasks.schedule.policy import SaveDecisionPolicy
from ckpt_tasks.state.overlap import StepFence
from ckpt_tasks.state.rng import capture_rng
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.training.counters import Counters
from ckpt_tasks.training.data.tracked_loaders import TrackedLoaders
from ckpt_tasks.training.loops import Loops
from ckpt_tasks.training.own import COUNTERS, OWN, RNG, STATE
from ckpt_tasks.training.ranked_saver import RankedSaver, Ranks
from ckpt_tasks.training.reporter import Reporter
from ckpt_tasks.training.restore import restored_values
from ckpt_tasks.training.rewind import Rewind
from ckpt_tasks.training.saver import Saver
from ckpt_tasks.types import Position, Scalar

__all__ = ["TrainingRun"]


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
    the first resumed iterator exists (making it draws), before its first batch is fetched.
    Nothing here draws from them, and nothing changes the training.

    **Code that runs again.** In every attempt, what precedes the loops; when an epoch is resumed
    midway, also what stands between the head of the epoch loop and the inner loop. What it logs
    is not logged again. Code behind the loops runs when they are over.

    **Variables of the loop.** Local variables start anew in each attempt; what lives in `state`
    is saved and restored. Early stopping, with ``run.state.update(best=math.inf, bad=0)`` before
    `track`, at the end of each epoch::

        run.state["bad"] = 0 if loss < run.state["best"] else run.state["bad"] + 1
        run.state["best"] = min(loss, run.state["best"])
        if run.state["bad"] >= patience:
            run.stop()

    **Iterators.** `steps` takes the tracked loader itself and is the outermost iterator:
    ``tqdm(run.steps(loader))``, not the reverse. Nested, repeated or untracked use raises.

    **Loops kept whole.** `step_done` and `save` are the boundaries. The generators are set back
    by `track` (and by `epochs`, if it is used), so draw nothing between it and the loop.

    Parameters
    ----------
    name, attempt
        Of the run, and the number of this execution of it.
    start
        The verified checkpoint to go on from; ``None`` starts at the beginning.
    asked_for
        A person named `start`: go on from there even if training was stopped or ended there.
    schedule
        Decides when to save.
    hyperparameters
        Flattened and masked.
    max_unprotected
        Seconds during which saves may fail before training does.
    grace
        Seconds that a request to stop leaves for the save.
    ranks
        This process is one rank of several, whose saves are made together; `schedule` is theirs.
    overlap
        What only steps change is copied until the next one; see `state.overlap`.
    row_blocks
        Tensors that are saved in blocks of rows; see `state.row_blocks`.
    makes_room
        As for the `Saver`.
    stop_on_error
        See `Saver`.
    """

    def __init__(
        self,
        *,
        name: str,
        attempt: int,
        checkpointer: Checkpointer,
        schedule: SaveDecisionPolicy,
        start: LoadedCheckpoint | ShardedCheckpoint | None = None,
        asked_for: bool = False,
        hyperparameters: Mapping[str, Scalar] | None = None,
        max_unprotected: float = 1800.0,
        grace: float = 30.0,
        overlap: bool = False,
        row_blocks: Sequence[str] = (),
        stop_on_error: bool = False,
        makes_room: bool = False,
        ranks: Ranks | None = None,
        on_event: EventSink = discard_event,
    ) -> None:
        self._name = name
        self._attempt = attempt
        self._hyperparameters = dict(hyperparameters or {})
        self._state: dict[str, Any] = {}
        self._resumed_from = start.record.id if start else None
        self._start = start
        self._items = TrackedItems(row_blocks)
        self._step_fence = StepFence() if overlap else None
        self._reporter = Reporter(on_event)
        self._loaders = TrackedLoaders(self._reporter.warn_once)
        self._tracked = False
        self._counters = Counters()
        if start is not None:
            values = restored_values(start, OWN, only=[COUNTERS])
            self._counters = Counters.from_dict(values[COUNTERS])
            if asked_for:
                self._counters.stopping = self._counters.finished = False
        self._ranks = ranks
        self._saver = (Saver if ranks is None else partial(RankedSaver, ranks=ranks))(
            name,
            checkpointer=checkpointer,
            schedule=schedule,
            capture=self._capture,
            exact=self._loaders.is_exact,
            on_event=on_event,
            reporter=self._reporter,
            start=start.record if start else None,
            max_unprotected=max_unprotected,
            grace=grace,
            stop_on_error=stop_on_error,
            makes_room=makes_room,
        )
        self._rewind = Rewind(self._reporter)
        self._loops = Loops(
            self._counters, self._loaders, self._saver, self._rewind, self._reporter
        )
        if start is not None:
            self._reporter.metrics.restore(start.record.metrics, self.step, self._counters.logged)

    @property
    def name(self) -> str:
        """The run's name, the same in every attempt."""
        return self._name

    @property
    def attempt(self) -> int:
        """Which execution of the run this is, from 1. Not for seeds: it differs after a crash."""
        return self._attempt

    @property
    def hyperparameters(self) -> dict[str, Scalar]:
        """What this attempt was called with, as it is recorded: flat, and secrets masked."""
        return self._hyperparameters

    @property
    def resumed_from(self) -> str | None:
        """Id of the checkpoint that this attempt started from; ``None`` at the beginning."""
        return self._resumed_from

    @property
    def state(self) -> dict[str, Any]:
        """The loop's own variables (best value, patience, running means): saved and restored.

        A dict, empty at first. Give it its initial values before `track`, which replaces them by
        the saved ones; read and change it anywhere. Values are what needs no pickle: numbers,
        texts, booleans, ``None``, tensors, and lists, tuples and dicts of these; anything else is
        a `StateError` that names the key. See the class for an example.
        """
        return self._state

    @property
    def step(self) -> int:
        """Steps done. Inside the n-th step, counted from 1, it is n - 1."""
        return self._counters.step

    @property
    def epoch(self) -> int:
        """Index of the epoch under way, from 0."""
        return self._counters.epoch

    @property
    def batch(self) -> int:
        """Index in the epoch of the (micro-)batch in hand, from 0.

        Unlike `enumerate`, which counts from where an epoch is resumed.
        """
        return self._counters.batch - 1

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
        if self._loops.inside_epochs:
            raise StateError("track() was called inside run.epochs(); call it before the loops")
        if self._tracked:
            raise StateError("track() was called twice; name everything in one call")
        for name, item in items.items():
            self._items.add(name, self._loaders.add(name, item) or item)
        self._tracked = True
        if self._step_fence is not None:
            self._step_fence.watch(items)
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
        return self._loops.epochs(total)

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
        state = self._loaders.of(loader)
        if state is None:
            raise ConfigError(
                f"run.steps() was given a {type(loader).__name__} that is not tracked; pass the "
                "very loader that was passed to track(), and wrap the result: "
                "tqdm(run.steps(loader))"
            )
        if accumulate < 1:
            raise ConfigError(f"accumulate={accumulate}: must be at least 1")
        return self._loops.steps(state, accumulate)

    def step_done(self) -> None:
        """For loops kept whole: say that a step is done. Saves if one is due.

        Raises `ConfigError` inside `steps`, which says so by itself.
        """
        self._need_tracked("step_done")
        if self._loops.inside_steps:
            raise ConfigError("step_done() was called inside run.steps(), which counts by itself")
        names = self._loaders.without_position
        if names:
            raise ConfigError(
                f"{names} keep no position when they are iterated by hand, being plain "
                "DataLoaders or made with a random sampler of torch's; use run.steps(loader), or "
                "torchdata's StatefulDataLoader with shuffle=True"
            )
        self._hold_by_hand()
        self._counters.end_step()
        self._saver.at_boundary("step", self._counters)

    def save(self, reason: str = "asked for by the training code") -> None:
        """Save at the next boundary; in loops kept whole, now.

        Between two uses of `epochs` it saves nothing: the boundary has been, and the code that
        follows it runs again.
        """
        self._need_tracked("save")
        if self._loops.inside_epochs:
            self._saver.request_save(reason)
        elif self._counters.looped and self.position == self._saver.newest:
            if self.checkpoint != self.resumed_from:
                self._reporter.warn_once(
                    f"run.save() saved nothing, as no step was done since {self.checkpoint}; in "
                    "loops kept whole, run.step_done() says that one is"
                )
        else:
            self._hold_by_hand()
            self._saver.request_save(reason)
            self._saver.at_boundary("step", self._counters, moved=True)

    def stop(self) -> None:
        """End both loops at the next boundary. The epoch's last code still runs."""
        self._counters.stopping = True

    def log(self, values: Mapping[str, Any] | None = None, /, **metrics: Any) -> None:
        """Log metrics for the step under way: once per key and step, however many crashes.

        Inside the n-th step, counted from 1, and behind it, values belong to step n. Checkpoints
        keep what was logged since the one before, for a registry that is away, or is added later:
        the newest 100,000 values. Where there are more, a warning says so.

        Parameters
        ----------
        values
            For names that are no identifiers: ``{"val/accuracy": 0.9}``.
        **metrics
            Numbers or tensors of one element.
        """
        if values:
            self._reporter.metrics.log(values)
        if metrics:
            self._reporter.metrics.log(metrics)

    @property
    def is_finished(self) -> bool:
        """The training function has returned already, in an attempt that then died."""
        return self._counters.finished

    def request_stop(self, reason: str) -> None:
        """Ask, from any thread, for a save at the next boundary and an end of this attempt."""
        self._saver.request_stop(reason)

    def report(self) -> None:
        """Send what was logged for the steps that are done, and wait for the save in flight.

        Nothing else may be done any more.
        """
        self._reporter.flush(self.position)
        self._saver.settle()

    def finish(self) -> None:
        """The training function has returned: save its end, unless that is saved already.

        Raises `ConfigError` if it has never called `track`: nothing was restored, and nothing
        can be saved.
        """
        counters = self._counters
        if not self._tracked and not counters.finished:
            raise ConfigError(
                "the training function returned without run.track(...): nothing was restored or "
                "saved, so the run is not complete; track its model, optimizer and loader before "
                "the loops"
            )
        self._saver.settle()
        if self.step == 0 and self.checkpoint is None:
            self._reporter.warn_once(
                "the training function returned without a step done, and the run counts as "
                "complete; if that is not meant: is there data, are there epochs, and do loops "
                "kept whole call run.step_done()?"
            )
        saved = self._saver.agreed(
            counters.finished or (self._loops.epochs_ended and self.checkpoint is not None)
        )
        if self._tracked and not saved:
            # The loops were left by `break`, or kept by hand: a resume must not train further.
            counters.finished = True
            if counters.in_flight:
                counters.end_step()
        self._saver.finish(counters, save=self._tracked and not saved)

    def close(self) -> None:
        """Give back what saves need; one that is in flight is finished by whoever writes it."""
        self._saver.close()

    # -- state --------------------------------------------------------------------------------

    def _capture(self) -> StagedState:
        own = {COUNTERS: self._counters.to_dict(), RNG: capture_rng(), STATE: self.state}
        captured = self._items.capture(own)
        state = captured if self._ranks is None else self._ranks.divide(captured)
        if self._step_fence is None or not self._saver.may_overlap:
            return state
        return self._step_fence.overlap(captured, state)

    def _restore(
        self,
        start: LoadedCheckpoint | ShardedCheckpoint,
        rename: Mapping[str, str | None],
        fresh: Collection[str],
    ) -> None:
        if isinstance(start, ShardedCheckpoint) and start.is_resharded:
            self._warn_of_differences(start)
        values = restored_values(start, OWN, optimizers=self._items.optimizers(rename))
        self._items.restore(values, rename=rename, fresh=fresh, own={STATE: self.state})
        self._start = None  # its memory is not needed any more
        self._loaders.prepare()
        self._rewind.begin(values[RNG])

    def _warn_of_differences(self, start: ShardedCheckpoint) -> None:
        names = [name for name in start.trees if name not in (COUNTERS, RNG)]
        lost = differing(start, names)
        if lost:
            self._reporter.warn_once(
                f"{start.record.id} was saved by {start.record.world_size} ranks and is restored "
                f"by {start.world_size}: all take rank 0's value of {', '.join(lost)}, which "
                "differed"
            )

    def _hold_by_hand(self) -> None:
        """What is now is what a checkpoint holds: training goes on in a loop kept whole."""
        self._rewind.end()
        self._loops.epochs_ended = self._counters.finished = False
        self._loaders.hold()

    def _need_tracked(self, what: str) -> None:
        if not self._tracked:
            raise ConfigError(f"run.{what}() was called before run.track(...)")
