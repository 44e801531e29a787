"""A sweep: one fault at every operation of something, recovery, and a look at what is left.

What is struck is a `Trial`: of a training in your store, say. For each operation, and each fate
that it can meet, a new trial is struck there, recovered without faults, and checked::

    cases = list(sweep(make_trial, FATES))
    print(summary(cases))
    assert not any(case.outcome in LOSSES for case in cases)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, Protocol

import msgspec

from ckpt_tasks.testing.faults import Fault
from ckpt_tasks.testing.files import FILE_OPERATIONS
from ckpt_tasks.testing.registry_wrappers import REGISTRY_CHANGES, REGISTRY_OPERATIONS
from ckpt_tasks.testing.wrappers import CHANGES, OPERATIONS

__all__ = [
    "FATES",
    "LOSSES",
    "OUTCOMES",
    "Case",
    "Fate",
    "Outcome",
    "Struck",
    "Trial",
    "summary",
    "sweep",
]

Outcome = Literal["ridden out", "recovered", "lost", "silent", "zombie", "not reached"]
"""How a case ended.

``ridden out``: what was struck came to its end nevertheless. ``recovered``: it failed or died, told
so, and a retry came to the same end. ``lost``: no retry comes to its end. ``silent``: it ended, but
not as it should have, or something is left that should not be. ``zombie``: what stalled and was
replaced has changed something afterwards. ``not reached``: it took fewer operations this time.
"""

OUTCOMES: tuple[Outcome, ...] = (
    "ridden out", "recovered", "lost", "silent", "zombie", "not reached",
)  # fmt: skip
LOSSES: tuple[Outcome, ...] = ("lost", "silent", "zombie")


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """A fault, but for its place: see `Fault`. It strikes the `operations` that it can."""

    name: str
    when: Literal["before", "during", "after", "late"]
    how: Literal["raise", "timeout", "kill", "stall"]
    operations: frozenset[str]

    def at(self, number: int) -> Fault:
        """The fault at one operation."""
        return Fault(at=number, when=self.when, how=self.how)


_ALL = OPERATIONS | REGISTRY_OPERATIONS | FILE_OPERATIONS
_CHANGES = CHANGES | REGISTRY_CHANGES | FILE_OPERATIONS
_HALVES = frozenset({"write", "file.writev"})

FATES: dict[str, Fate] = {
    fate.name: fate
    for fate in (
        Fate(name="raise", when="before", how="raise", operations=_ALL),
        Fate(name="ambiguous", when="after", how="timeout", operations=_CHANGES),
        Fate(name="half", when="during", how="raise", operations=_HALVES),
        Fate(name="late", when="late", how="raise", operations=CHANGES),
        # Before one change is what after the one before it is.
        Fate(name="kill", when="after", how="kill", operations=_CHANGES),
        Fate(name="kill half", when="during", how="kill", operations=_HALVES),
        Fate(name="stall", when="before", how="stall", operations=_ALL),
    )
}
"""What can happen to an operation, by name. A time-out is what makes the ``ambiguous`` ones so."""


class Struck(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a trial that was struck.

    Parameters
    ----------
    reached
        Whether the operation was asked for.
    failed
        It died, or said that it had failed.
    problems
        What it should have told and has not, for people.
    zombie
        What it has changed after it was replaced, for people.
    """

    reached: bool
    failed: bool
    problems: Sequence[str] = ()
    zombie: Sequence[str] = ()


class Trial(Protocol):
    """Something that is struck once."""

    def count(self) -> list[tuple[str, str]]:
        """Do it without a fault; returns its operations in order, as (operation, subject)."""

    def strike(self, fault: Fault) -> Struck:
        """Do it with a fault, whose time-out need not be waited for. What a ``stall`` stops is
        replaced meanwhile, and goes on then.
        """

    def recover(self) -> str | None:
        """Retry without faults; returns why that cannot be done, for people."""

    def check(self) -> Sequence[str]:
        """What is not as it should be now, for people."""

    def close(self) -> None:
        """Remove what is left of it."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One fault at one operation, and how it ended. `details` says what is wrong."""

    sweep: str
    fate: str
    number: int
    operation: str
    subject: str
    outcome: Outcome
    details: Sequence[str] = ()


def sweep(
    make_trial: Callable[[], Trial],
    fates: Collection[Fate],
    *,
    name: str = "",
    chosen: Callable[[int], bool] = lambda number: True,
) -> Iterator[Case]:
    """Strike every operation with every fate that it can meet.

    Parameters
    ----------
    make_trial
        Makes a new trial, with nothing left of others.
    name
        Of this sweep, in `Case.sweep`.
    chosen
        Which of the cases, numbered from 0, are tried; by default all.
    """
    trial = make_trial()
    try:
        log = trial.count()
    finally:
        trial.close()
    cases = [
        (fate, number)
        for fate in fates
        for number, (operation, _) in enumerate(log, 1)
        if operation in fate.operations
    ]
    for place, (fate, number) in enumerate(cases):
        if chosen(place):
            operation, subject = log[number - 1]
            outcome, details = _try(make_trial(), fate.at(number))
            yield Case(
                sweep=name,
                fate=fate.name,
                number=number,
                operation=operation,
                subject=subject,
                outcome=outcome,
                details=details,
            )


def _try(trial: Trial, fault: Fault) -> tuple[Outcome, Sequence[str]]:
    try:
        struck = trial.strike(fault)
        if not struck.reached:
            return "not reached", ()
        if struck.zombie:
            return "zombie", struck.zombie
        why = trial.recover()
        if why is not None:
            return "lost", (why,)
        problems = (*struck.problems, *trial.check())
        if problems:
            return "silent", problems
        return ("recovered" if struck.failed else "ridden out"), ()
    finally:
        trial.close()


def summary(cases: Collection[Case]) -> str:
    """A table of how many cases of each sweep and fate ended how."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        counts.setdefault((case.sweep, case.fate), Counter())[case.outcome] += 1
    rows = [("sweep", "fate", "cases", *OUTCOMES)]
    for (name, fate), ended in counts.items():
        rows.append((name, fate, str(ended.total()), *(str(ended[o]) for o in OUTCOMES)))
    total = Counter(case.outcome for case in cases)
    rows.append(("all", "", str(len(cases)), *(str(total[outcome]) for outcome in OUTCOMES)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
