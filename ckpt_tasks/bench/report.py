"""A benchmark's outcome: a table for people, a record for machines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from ckpt_tasks.bench.measure import Measured, median_ratio
from ckpt_tasks.bench.training import Disturbance

__all__ = [
    "Advice",
    "AsyncFigure",
    "BenchReport",
    "Figure",
    "Memory",
    "Resave",
    "async_figures_of",
    "figures_of",
]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table.

    Parameters
    ----------
    seconds
        Median over the rounds.
    gigabytes_per_second, cpu_seconds_per_gigabyte
        Of the state's bytes.
    ratio
        To the table's first peer, the median of the rounds' ratios; ``None`` where there is none.
    """

    name: str
    seconds: float
    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float
    ratio: float | None


class AsyncFigure(msgspec.Struct, frozen=True, kw_only=True):
    """An asynchronous save beside a training; medians over the rounds.

    Parameters
    ----------
    stall, drain, slow_down
        Seconds; see `Disturbance`.
    cpu_seconds_per_gigabyte
        Of trainer and helpers, without what the training took; of the state's bytes.
    stall_ratio
        To the bare copy of the same bytes, the median of the rounds' ratios.
    slow_down_ratio
        Of the medians, to that of DCP by a process; ``None`` where that was not measured, or
        was lost in the noise. Slow-downs come close to nothing: ratios of rounds would tell
        nothing.
    """

    name: str
    stall: float
    drain: float
    slow_down: float
    cpu_seconds_per_gigabyte: float
    stall_ratio: float
    slow_down_ratio: float | None

    @property
    def cost(self) -> float:
        """Seconds by which it delays the training."""
        return self.stall + max(0.0, self.slow_down)


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What asynchronous saves hold in memory beyond the state, times the state's bytes.

    Parameters
    ----------
    after_first, after_last
        After the first of so many `saves`, and after the last.
    """

    saves: int
    after_first: float
    after_last: float


class Resave(msgspec.Struct, frozen=True, kw_only=True):
    """A save of a state of which little has changed since the save before.

    Parameters
    ----------
    seconds
        Median over the rounds.
    written
        Bytes written, as a share of the checkpoint's.
    ratio
        Of its time to that of the full save, the median of the rounds' ratios.
    """

    name: str
    seconds: float
    written: float
    ratio: float


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What follows.

    Parameters
    ----------
    save, asynchronous, load
        What bounds each, in a sentence; ``None`` where it was not measured.
    cost
        Seconds by which a save delays the training: of an asynchronous one where there is one.
    every
        Seconds between two saves that cost least in all.
    overhead
        Share of the training's time that saves take then.
    """

    save: str
    asynchronous: str | None
    load: str
    cost: float
    every: float
    overhead: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """One state on one store.

    Parameters
    ----------
    state, size, tensors
        Its name, its bytes, and how many tensors it has.
    store
        Where it was written, userinfo masked.
    limits, saves, loads
        The bare operations, then blocking saves and loads with what else was measured beside
        them.
    step
        Seconds of an undisturbed step of the training beside which `async_saves` were measured.
    planning
        Seconds that a save spends on neither copying nor writing: looking at the state, planning,
        describing.
    missing
        What could not be measured, and why.
    """

    state: str
    size: int
    tensors: int
    store: str
    rounds: int
    limits: list[Figure]
    saves: list[Figure]
    async_saves: list[AsyncFigure]
    step: float | None
    loads: list[Figure]
    resaves: list[Resave]
    memory: Memory | None
    planning: float
    missing: list[str]
    advice: Advice


def figures_of(measured: dict[str, Measured], size: int, *, against: str | None) -> list[Figure]:
    """Lines of a table, the fastest first.

    Parameters
    ----------
    against
        Name of the one that the others are compared with.
    """
    base = measured.get(against) if against is not None else None
    gigabytes = size / 1e9
    return sorted(
        (
            Figure(
                name=each.name,
                seconds=each.median,
                gigabytes_per_second=gigabytes / each.median,
                cpu_seconds_per_gigabyte=each.cpu_median / gigabytes,
                ratio=None if base is None else median_ratio(each.seconds, base.seconds),
            )
            for each in measured.values()
        ),
        key=lambda figure: figure.seconds,
    )


def async_figures_of(
    measured: Mapping[str, Sequence[Disturbance]],
    size: int,
    *,
    copies: Sequence[float],
    against: str,
) -> list[AsyncFigure]:
    """Lines of a table, the least delay of the training first.

    Parameters
    ----------
    copies
        Seconds of the bare copy in each round.
    against
        Name of the one whose slow-down the others' is compared with.
    """
    slow_downs = {
        name: statistics.median(each.slow_down for each in rounds)
        for name, rounds in measured.items()
    }
    base = slow_downs.get(against, 0.0)
    return sorted(
        (
            AsyncFigure(
                name=name,
                stall=statistics.median(each.stall for each in rounds),
                drain=statistics.median(each.drain for each in rounds),
                slow_down=slow_downs[name],
                cpu_seconds_per_gigabyte=statistics.median(each.cpu_seconds for each in rounds)
                / (size / 1e9),
                stall_ratio=median_ratio([each.stall for each in rounds], copies),
                slow_down_ratio=slow_downs[name] / base if base > 0 else None,
            )
            for name, rounds in measured.items()
        ),
        key=lambda figure: figure.cost,
    )
