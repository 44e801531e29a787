"""The protocol of claim, choose, commit and collect as a small explicit-state model.

Up to three **trainers** (attempts) and one **collector** share a store. Each is a machine whose
every step is one operation on the store or the registry, which nothing can split; between any two
steps any other process may run. What a step reads may be out of date by the next one.

A checkpoint is written as who trained each of its steps: ``(1, 1, 2)`` is step 3, which attempt 2
trained on top of step 2 of attempt 1. The protocol itself looks only at what an id tells, its
attempt ``c[-1]`` and its step ``len(c)``; the rest is the truth that invariants compare with.

What needs no step of its own:

- A **crash**: a process that is never scheduled again is dead, and invariants hold in every state.
- **Damage** happens whenever it is found: a read may find it as long as the budget lasts.
- **Training**: it is not seen by others, and happens with the write of the data.

Time enters in one place. The collector's step ``wait`` ends every process that still stands
between a check and what the check guards: its grace is declared to be longer than any such pause.
What is not promised without it is shown by the mutant ``no_grace``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Checkpoint = tuple[int, ...]
START: Checkpoint = ()
Checkpoints = frozenset[Checkpoint]
NONE: Checkpoints = frozenset()
Records = tuple[Checkpoint | None, ...]
"""What each attempt resumed from; ``None`` where it has not said so."""


class Violation(Exception):  # noqa: N818 - it is what is looked for, not an error
    """A step did what the protocol promises never to do."""


@dataclass(frozen=True)
class Bounds:
    """How much may happen.

    Parameters
    ----------
    attempts, commits
        Trainers, and checkpoints that each one saves.
    damages, lost_answers, collectors
        Checkpoints that turn out damaged, creates whose answer is lost and that land at any later
        time or never, collectors started: in all.
    incremental
        A checkpoint names bytes of the one before it where it may.
    """

    attempts: int = 3
    commits: int = 2
    damages: int = 0
    lost_answers: int = 0
    collectors: int = 0
    incremental: bool = False


class Store(NamedTuple):
    """What all processes share, and (below the line) what only invariants look at."""

    claims: int = 0
    resumed: Records = ()
    commits: Checkpoints = NONE
    names_bytes_of: frozenset[tuple[Checkpoint, Checkpoint]] = frozenset()
    damaged: Checkpoints = NONE
    gone: Checkpoints = NONE
    quarantined: Checkpoints = NONE
    expired: Checkpoints = NONE
    collecting: Checkpoints = NONE
    registered: Checkpoints = NONE
    alias: Checkpoint = START
    # ---
    committed_in_time: Checkpoints = NONE  # while no later attempt had claimed
    verified: Checkpoints = NONE
    last_commit: Checkpoint = START  # for the mutant that goes by time
    damages: int = 0
    lost_answers: int = 0
    collectors: int = 0

    def intact(self, checkpoint: Checkpoint) -> bool:
        """Whether all bytes that `checkpoint` needs are there and right."""
        lost = self.gone | self.damaged
        return checkpoint not in lost and self.home(checkpoint) not in lost

    def home(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint in whose data the bytes lie that `checkpoint` did not write itself."""
        return next((home for c, home in self.names_bytes_of if c == checkpoint), checkpoint)


class Trainer(NamedTuple):
    """One attempt's process: where it stands, and what it remembers."""

    at: str = "list claims"
    attempt: int = 0
    put: str = ""  # a create without an answer: "flying", or "landed"
    marks: Checkpoints = NONE
    commits: Checkpoints = NONE
    resumed: Records = ()
    candidates: tuple[Checkpoint, ...] = ()
    memory: Checkpoint = START  # the state that it has restored or trained
    home: Checkpoint = START
    saves: int = 0
    late: bool = False  # ghost: a later attempt had claimed when the data was written

    def go(self, at: str, **changes: object) -> Trainer:
        return self._replace(at=at, **changes)


class Collector(NamedTuple):
    """Expires and collects one checkpoint, in the name of an attempt."""

    at: str
    attempt: int
    keep: Checkpoint
    victim: Checkpoint = START
    free: bool = False
    late: bool = False  # ghost: a later attempt had claimed when the mark was written

    def go(self, at: str, **changes: object) -> Collector:
        return self._replace(at=at, **changes)


class State(NamedTuple):
    store: Store
    trainers: tuple[Trainer, ...]
    collector: Collector | None = None


ENDED = Trainer(at="ended")

GUARDED = frozenset({"quarantine", "adopt", "commit", "check commit", "register", "alias"})
"""Where a trainer stands between a check and what the check guards."""


@dataclass(frozen=True)
class Rules:
    """The protocol within `bounds`; `mutant` names the one rule that is broken."""

    bounds: Bounds
    mutant: str = ""


def in_order(trainers: Iterable[Trainer]) -> tuple[Trainer, ...]:
    """Trainers are alike, so states that differ in their order only are one state."""
    return tuple(sorted(trainers, key=lambda t: (t.attempt, t.at, t.put, t.candidates)))


def stale(store: Store, attempt: int) -> bool:
    """What a fence check answers: whether ``attempts/<attempt + 1>`` exists."""
    return store.claims > attempt


def lineage(resumed: Records) -> dict[int, int | None]:
    """Attempts on the lineage, each with the last of its steps that counts (``None``: all)."""
    trained = [number for number, base in enumerate(resumed, start=1) if base is not None]
    attempt = max(trained, default=0)
    counted: dict[int, int | None] = {}
    cap: int | None = None
    while attempt:
        counted[attempt] = cap
        base = resumed[attempt - 1]
        if base is None:
            raise Violation(f"attempt {attempt} is on the lineage, but has no resumed record")
        attempt, cap = (base[-1], len(base)) if base else (0, None)
    return counted


def on_lineage(checkpoint: Checkpoint, counted: dict[int, int | None]) -> bool:
    attempt = checkpoint[-1]
    if attempt not in counted:
        return False
    cap = counted[attempt]
    return cap is None or len(checkpoint) <= cap
