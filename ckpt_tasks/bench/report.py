"""A benchmark's outcome: a table for people, a record for machines, and what follows from it."""

from __future__ import annotations

import math

import msgspec

from ckpt_tasks.bench.measure import Measured

__all__ = ["BenchReport", "Figure", "figures_of", "interval"]

_BUDGET = 0.035
"""Share of the training's time that saves may take: CheckFreq's (Mohan et al., FAST 2021)."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table.

    Parameters
    ----------
    seconds
        Median over the rounds.
    gigabytes_per_second, cpu_seconds_per_gigabyte
        Of the state's bytes.
    ratio
        To the table's first peer; ``None`` where there is none.
    """

    name: str
    seconds: float
    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float
    ratio: float | None


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """One state on one store.

    Parameters
    ----------
    state, size
        Its name and bytes.
    limits, saves, loads
        The bare operations, then saves and loads with what else was measured beside them.
    bound
        What bounds a save, in a sentence.
    every
        Seconds between two saves that are worth it.
    missing
        Peers that could not be measured, and why.
    """

    state: str
    size: int
    rounds: int
    limits: list[Figure]
    saves: list[Figure]
    loads: list[Figure]
    bound: str
    every: float
    missing: list[str]


def figures_of(measured: dict[str, Measured], size: int, *, against: str | None) -> list[Figure]:
    """Lines of a table, the fastest first.

    Parameters
    ----------
    against
        Name of the one that the others are compared with.
    """
    base = measured[against].median if against in measured else None
    gigabytes = size / 1e9
    return sorted(
        (
            Figure(
                name=each.name,
                seconds=each.median,
                gigabytes_per_second=gigabytes / each.median,
                cpu_seconds_per_gigabyte=each.cpu_median / gigabytes,
                ratio=None if base is None else each.median / base,
            )
            for each in measured.values()
        ),
        key=lambda figure: figure.seconds,
    )


def interval(cost: float, mean_time_between_failures: float) -> float:
    """Seconds between two saves that cost least in all.

    Young's optimum (CACM 1974), ``sqrt(2 C M)``; longer where saves would take more than
    their budget.

    Parameters
    ----------
    cost
        Seconds by which a save delays the training.
    mean_time_between_failures
        Seconds.
    """
    return max(math.sqrt(2 * cost * mean_time_between_failures), cost / _BUDGET)
