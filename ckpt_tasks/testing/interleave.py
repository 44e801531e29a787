"""Running real code under chosen interleavings of its store operations.

Each **actor** is a function that gets a store of its own, a `ScheduledStore` around the one they
share. Before each operation it stops until a scheduler lets it go on; between two operations
nobody else runs, so a run is determined by the choices made, and can be repeated from them.

`run_interleaved` runs the actors once; `ckpt_tasks.testing.explore` runs them under every schedule
that can make a difference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.base import Store
from ckpt_tasks.testing.wrappers import CHANGES, Operation, WrapperStore

__all__ = [
    "Actor",
    "ActorKilled",
    "Choice",
    "Fate",
    "Interleaving",
    "Pending",
    "ScheduledStore",
    "Step",
    "follow",
    "run_interleaved",
]

Actor = Callable[[Store], Any]

Fate = Literal["run", "kill", "lose_request", "lose_answer"]

T = TypeVar("T")

_PATIENCE = 60.0  # seconds; an actor that needs longer between two operations hangs


class ActorKilled(BaseException):
    """Ends an actor at its next operation, as SIGKILL would: no handler of errors sees it."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An operation that an actor is about to do."""

    actor: int
    operation: Operation
    path: str

    def conflicts(self, other: Pending) -> bool:
        """Whether the order of the two can make a difference."""
        if self.operation not in CHANGES and other.operation not in CHANGES:
            return False
        return self._sees(other.path) or other._sees(self.path)

    def _sees(self, path: str) -> bool:
        if self.operation in ("list_objects", "list_folders"):
            return path.startswith(self.path)
        return path == self.path


@dataclass(frozen=True, slots=True)
class Choice:
    """Which actor does its next operation, and what becomes of it.

    ``lose_request`` and ``lose_answer`` raise `StoreError`: the operation does not take effect,
    or it does.
    """

    actor: int
    fate: Fate = "run"


@dataclass(frozen=True, slots=True)
class Step:
    """What happened at one choice; `error` is what the operation itself raised."""

    pending: Pending
    fate: Fate
    error: Exception | None

    @property
    def took_effect(self) -> bool:
        return self.fate in ("run", "lose_answer") and self.error is None

    def __str__(self) -> str:
        what = f"actor {self.pending.actor}: {self.pending.operation} {self.pending.path}"
        fate = "" if self.fate == "run" else f" [{self.fate}]"
        return f"{what}{fate}" + (f" -> {type(self.error).__name__}" if self.error else "")


@dataclass
class Interleaving:
    """One run of all actors.

    Attributes
    ----------
    steps
        What happened, in order.
    results, errors
        What each actor returned or raised; `ActorKilled` for one that was killed.
    """

    steps: list[Step] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    errors: list[BaseException | None] = field(default_factory=list)

    @property
    def choices(self) -> list[Choice]:
        """The schedule: given to `follow`, it repeats this run."""
        return [Choice(step.pending.actor, step.fate) for step in self.steps]

    def __str__(self) -> str:
        ends = [f"actor {n}: {e!r}" for n, e in enumerate(self.errors) if e is not None]
        return "\n".join([*map(str, self.steps), *ends])


Scheduler = Callable[[Sequence[Pending]], Choice]
"""Picks among the operations that may come next, ordered by actor."""


class ScheduledStore(WrapperStore):
    """One actor's view of the shared store: every operation waits for its turn.

    An actor's operations must come from one thread at a time.

    Parameters
    ----------
    store
        The shared store.
    turn
        Waits for the operation's turn and carries it out.
    unseen
        Folders whose objects no other actor looks at before this one has named them elsewhere
        (``data/`` under a write-id): operations there do not wait.
    """

    def __init__(self, store: Store, turn: _Turn, *, unseen: Collection[str] = ()) -> None:
        super().__init__(store)
        self._turn = turn
        self._unseen = tuple(unseen)

    def _run(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        if path.startswith(self._unseen):
            return self._turn.unless_killed(call)
        return self._turn.take(operation, path, call)


class _Turn:
    """The hand-over between the controller and one actor's thread."""

    def __init__(self, number: int, arrived: threading.Semaphore) -> None:
        self.pending: Pending | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.step: Step | None = None
        self._number = number
        self._arrived = arrived
        self._go = threading.Semaphore(0)
        self._fate: Fate = "run"
        self._killed = False

    def start(self, actor: Actor, store: Store) -> threading.Thread:
        thread = threading.Thread(target=self._main, args=(actor, store), daemon=True)
        thread.start()
        return thread

    def _main(self, actor: Actor, store: Store) -> None:
        try:
            self.result = actor(store)
        except BaseException as error:
            self.error = error
        self.pending = None
        self._arrived.release()

    def let_go(self, fate: Fate) -> None:
        self._fate = fate
        self._killed = fate == "kill"
        self._go.release()

    def unless_killed(self, call: Callable[[], T]) -> T:
        if self._killed:  # what is dead cleans nothing up
            raise ActorKilled
        return call()

    def take(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        if self._killed:
            raise ActorKilled
        pending = self.pending = Pending(self._number, operation, path)
        self._arrived.release()
        self._go.acquire()
        fate = self._fate
        self.step = Step(pending, fate, None)
        if self._killed:
            raise ActorKilled
        if fate == "lose_request":
            raise StoreError(f"the request to {operation} {path} was lost")
        try:
            result = call()
        except Exception as error:
            self.step = Step(pending, fate, error)
            raise
        if fate == "lose_answer":
            raise StoreError(f"the answer to {operation} {path} was lost")
        return result


def run_interleaved(
    store: Store, actors: Sequence[Actor], scheduler: Scheduler, *, unseen: Collection[str] = ()
) -> Interleaving:
    """Run `actors` against `store`, one operation at a time, in the order `scheduler` picks.

    Parameters
    ----------
    store
        Shared by all; each actor gets a `ScheduledStore` around it.
    scheduler
        Asked before each operation. See `follow`.
    unseen
        See `ScheduledStore`.
    """
    arrived = threading.Semaphore(0)
    turns = [_Turn(number, arrived) for number in range(len(actors))]
    threads: list[threading.Thread] = []
    run = Interleaving()
    try:
        for turn, actor in zip(turns, actors, strict=True):
            threads.append(turn.start(actor, ScheduledStore(store, turn, unseen=unseen)))
            _wait(arrived, turn)
        while waiting := [turn.pending for turn in turns if turn.pending is not None]:
            choice = scheduler(waiting)
            turn = turns[choice.actor]
            turn.let_go(choice.fate)
            _wait(arrived, turn)
            assert turn.step is not None
            run.steps.append(turn.step)
    finally:
        for turn in turns:
            if turn.pending is not None:
                turn.let_go("kill")
        for thread in threads:
            thread.join(_PATIENCE)
    run.results = [turn.result for turn in turns]
    run.errors = [turn.error for turn in turns]
    return run


def _wait(arrived: threading.Semaphore, turn: _Turn) -> None:
    if not arrived.acquire(timeout=_PATIENCE):
        raise TimeoutError(f"an actor neither ended nor reached a store operation: {turn.pending}")


def follow(picks: Sequence[int | Choice]) -> Scheduler:
    """A scheduler that takes its choices from a list, and then lets each actor run to its end.

    Parameters
    ----------
    picks
        A number picks among the actors that can go on, modulo how many there are, so that any
        list of numbers is a schedule. A `Choice` names its actor; where that has ended, the
        first one goes on.
    """
    left = iter(picks)

    def pick(waiting: Sequence[Pending]) -> Choice:
        choice = next(left, 0)
        if isinstance(choice, int):
            return Choice(waiting[choice % len(waiting)].actor)
        if choice.actor not in [pending.actor for pending in waiting]:
            return Choice(waiting[0].actor)
        return choice

    return pick
