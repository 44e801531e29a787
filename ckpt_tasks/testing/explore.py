"""Running real code under every interleaving of its store operations that can make a difference.

Two schedules that differ only in the order of operations which do not see each other (a read and
a read, or operations on different paths) are one. Sleep sets leave the second one out: Godefroid,
*Partial-Order Methods for the Verification of Concurrent Systems*, LNCS 1032, 1996, chapter 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ckpt_tasks.store.base import Store
from ckpt_tasks.testing.interleave import (
    Actor,
    Choice,
    Fate,
    Interleaving,
    Pending,
    run_interleaved,
)
from ckpt_tasks.testing.wrappers import CHANGES

__all__ = ["Limits", "explore"]


class _Redundant(BaseException):
    """The schedule differs from one already run in nothing that an actor could notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much goes wrong in each of the schedules that `explore` runs.

    Parameters
    ----------
    kills
        Actors killed.
    lost_answers, lost_requests
        Changes whose answer is lost after, or whose request is lost before they take effect.
    """

    kills: int = 0
    lost_answers: int = 0
    lost_requests: int = 0


@dataclass(frozen=True, slots=True)
class _Branch:
    """A schedule's beginning, and the actors that need not move next: that was explored."""

    choices: tuple[Choice, ...]
    asleep: frozenset[Pending]


def explore(
    prepare: Callable[[], tuple[Store, Sequence[Actor]]],
    check: Callable[[Interleaving], None],
    *,
    limits: Limits | None = None,
    unseen: Collection[str] = (),
) -> int:
    """Run the actors under every schedule that can make a difference.

    Parameters
    ----------
    prepare
        Makes a fresh store and fresh actors for each run. The actors must do the same operations
        whenever they get the same answers.
    check
        Called after each run, and raises if it went wrong; the run's steps are added as a note.

    Returns
    -------
    int
        How many schedules were run to their end.
    """
    todo = [_Branch((), frozenset())]
    complete = 0
    while todo:
        search = _Search(todo.pop(), limits or Limits())
        store, actors = prepare()
        try:
            run = run_interleaved(store, actors, search, unseen=unseen)
        except _Redundant:
            todo += search.branches
            continue
        complete += 1
        try:
            check(run)
        except BaseException as error:
            error.add_note(f"in this interleaving ({complete} before it were right):\n{run}")
            raise
        todo += search.branches
    return complete


class _Search:
    """A scheduler that follows a branch, goes on depth first, and notes where else to go."""

    def __init__(self, branch: _Branch, limits: Limits) -> None:
        self.branches: list[_Branch] = []
        self._branch = branch
        self._limits = limits
        self._taken: list[Choice] = []
        self._asleep = branch.asleep

    def __call__(self, waiting: Sequence[Pending]) -> Choice:
        number = len(self._taken)
        if number < len(self._branch.choices):
            choice = self._branch.choices[number]
        else:
            choice = self._explore(waiting)
        self._taken.append(choice)
        return choice

    def _explore(self, waiting: Sequence[Pending]) -> Choice:
        awake = [pending for pending in waiting if pending not in self._asleep]
        self._branch_off_losses(waiting)
        if not awake:
            raise _Redundant
        asleep = self._asleep
        for pending in awake:
            still = _still(asleep, pending)
            if pending is awake[0]:
                self._asleep = still
            else:
                self._add(Choice(pending.actor), still)
            if pending.operation in CHANGES and self._may("lose_answer"):
                self._add(Choice(pending.actor, "lose_answer"), still)
            asleep = asleep | {pending}
        return Choice(awake[0].actor)

    def _branch_off_losses(self, waiting: Sequence[Pending]) -> None:
        """Kill an actor, or lose its request: nobody else sees when, so one moment stands for
        all, the one after its last operation.
        """
        for pending in waiting:
            if self._taken and self._taken[-1].actor == pending.actor:
                still = frozenset(p for p in self._asleep if p.actor != pending.actor)
                if self._may("kill"):
                    self._add(Choice(pending.actor, "kill"), still)
                if pending.operation in CHANGES and self._may("lose_request"):
                    self._add(Choice(pending.actor, "lose_request"), still)

    def _may(self, fate: Fate) -> bool:
        allowed = {
            "kill": self._limits.kills,
            "lose_answer": self._limits.lost_answers,
            "lose_request": self._limits.lost_requests,
        }
        return sum(choice.fate == fate for choice in self._taken) < allowed[fate]

    def _add(self, choice: Choice, asleep: frozenset[Pending]) -> None:
        self.branches.append(_Branch((*self._taken, choice), asleep))


def _still(asleep: frozenset[Pending], moved: Pending) -> frozenset[Pending]:
    """A sleeping actor wakes when an operation is done whose order with its own matters."""
    return frozenset(p for p in asleep if p.actor != moved.actor and not p.conflicts(moved))
