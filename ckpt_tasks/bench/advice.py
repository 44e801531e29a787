"""What follows from a benchmark: what bounds saves and loads, and which interval pays."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ckpt_tasks.bench.measure import Measured
from ckpt_tasks.bench.report import Advice, AsyncFigure

__all__ = ["BUDGET", "advise", "interval"]

BUDGET = 0.035
"""Share of the training's time that saves may take: CheckFreq's (Mohan et al., FAST 2021)."""

_SAVE = {"copy": "copying the state", "hash": "digests", "raw write": "writing to the store"}
_LOAD = {"raw read": "reading from the store", "hash": "digests", "copy": "copying the state"}


def advise(
    limits: Mapping[str, Measured],
    save: float,
    asynchronous: AsyncFigure | None,
    load: float,
    *,
    mean_time_between_failures: float,
) -> Advice:
    """Compare what was measured with the bare operations that it is made of.

    Parameters
    ----------
    limits
        Name to bare operation: ``copy``, ``hash``, ``raw write``, ``raw read``.
    save, load
        Seconds of a blocking save and of a load.
    mean_time_between_failures
        Seconds.
    """
    cost = save if asynchronous is None else asynchronous.cost
    drain = 0.0 if asynchronous is None else asynchronous.drain
    every = interval(cost, mean_time_between_failures, drain=drain)
    return Advice(
        save=_bound("a blocking save", _SAVE, limits, save),
        asynchronous=None if asynchronous is None else _bound_of(asynchronous, limits),
        load=_bound("a load", _LOAD, limits, load),
        cost=cost,
        every=every,
        overhead=cost / every,
    )


def interval(cost: float, mean_time_between_failures: float, *, drain: float = 0.0) -> float:
    """Seconds between two saves that cost least in all.

    Young's optimum (CACM 1974), ``sqrt(2 C M)``; longer where saves would take more than
    their budget, or come before the one before them is durable.

    Parameters
    ----------
    cost
        Seconds by which a save delays the training.
    mean_time_between_failures, drain
        Seconds.
    """
    return max(math.sqrt(2 * cost * mean_time_between_failures), cost / BUDGET, drain)


def _bound(
    what: str, parts: Mapping[str, str], limits: Mapping[str, Measured], seconds: float
) -> str:
    slowest = max(parts, key=lambda name: limits[name].median)
    alone = limits[slowest].median
    return (
        f"{parts[slowest]} bounds {what}: {alone:.3f} s alone, of {seconds:.3f} s "
        f"({seconds / alone:.2f} times)"
    )


def _bound_of(figure: AsyncFigure, limits: Mapping[str, Measured]) -> str:
    write = limits["raw write"].median
    slowed = (
        f"and slows it by {figure.slow_down:.3f} s"
        if figure.slow_down > 0
        else "and does not slow it"
    )
    return (
        f"the copy bounds what an asynchronous save holds training up: {figure.stall:.3f} s, "
        f"{figure.stall_ratio:.2f} times the bare copy; it is durable after {figure.drain:.3f} s "
        f"(writing alone takes {write:.3f} s) {slowed} meanwhile"
    )
