"""The rules that keep checkpoints: each is its own configuration, with one method.

A rule is asked about the commit records that a retry could start from, newest first, and answers
with the ids of those that it keeps, each with a reason for people. What no rule keeps may go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from ckpt_tasks.config import RetentionConfig, parse_best, parse_bucket
from ckpt_tasks.format.records import CommitRecord

__all__ = [
    "BestN",
    "EveryNEpochs",
    "EveryNSteps",
    "LatestN",
    "Rule",
    "TimeBucket",
    "age_of",
    "completed_epochs",
    "readable_duration",
    "rules_of",
]

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


class Rule(Protocol):
    """What keeps checkpoints."""

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        """Ids of the `records` (newest first) that are kept, each with a reason."""
        ...


@dataclass(frozen=True, slots=True)
class LatestN:
    """The newest `count`."""

    count: int

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        return dict.fromkeys((r.id for r in records[: self.count]), f"latest {self.count}")


@dataclass(frozen=True, slots=True)
class BestN:
    """The `count` with the best values of a metric; of equal ones, the earlier.

    Where no checkpoint has the metric, all are kept: nothing tells which is best, and a name that
    is written wrongly must cost nobody a checkpoint.
    """

    count: int
    metric: str
    mode: Literal["min", "max"]

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        sign = 1.0 if self.mode == "min" else -1.0
        scored = [
            (sign * value, record)
            for record in reversed(records)
            if math.isfinite(value := float(record.metrics.get(self.metric, "nan")))
        ]
        if not scored:
            why = f"no checkpoint has {self.metric!r}, so that none is known to be better"
            return dict.fromkeys((r.id for r in records), why)
        scored.sort(key=lambda one: one[0])  # stable: the earlier of equals stays ahead
        return {
            record.id: f"best {self.count} by {self.metric} ({sign * value:g})"
            for value, record in scored[: self.count]
        }


@dataclass(frozen=True, slots=True)
class EveryNSteps:
    """The first at or after each multiple of `count` steps."""

    count: int

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        return _first_of_each(records, self.count, lambda record: record.position.step, "steps")


@dataclass(frozen=True, slots=True)
class EveryNEpochs:
    """The first at or after each multiple of `count` completed epochs."""

    count: int

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        return _first_of_each(records, self.count, completed_epochs, "epochs")


@dataclass(frozen=True, slots=True)
class TimeBucket:
    """Of those younger than `within` seconds, the newest of every `every` seconds; 0 keeps all.

    Buckets lie at whole multiples of `every` since the epoch (UTC), so that what is kept of the
    past does not change as time goes on.
    """

    every: float
    within: float

    def keeps(self, records: Sequence[CommitRecord], now: datetime) -> dict[str, str]:
        kept: dict[str, str] = {}
        taken: set[float] = set()
        within = readable_duration(self.within)
        for record in records:
            if age_of(record, now) > self.within:
                continue
            if not self.every:
                kept[record.id] = f"younger than {within}"
                continue
            bucket = _created(record).timestamp() // self.every
            if bucket not in taken:
                taken.add(bucket)
                kept[record.id] = f"newest of its {readable_duration(self.every)}, for {within}"
        return kept


def rules_of(config: RetentionConfig) -> list[Rule]:
    """The rules that a configuration names."""
    best = [parse_best(text) for text in config.best]
    buckets = [parse_bucket(text) for text in config.buckets]
    rules: list[Rule] = []
    if config.latest is not None:
        rules.append(LatestN(config.latest))
    rules += [BestN(one.count, one.metric, one.mode) for one in best]
    if config.every_steps is not None:
        rules.append(EveryNSteps(config.every_steps))
    if config.every_epochs is not None:
        rules.append(EveryNEpochs(config.every_epochs))
    rules += [TimeBucket(one.every, one.within) for one in buckets]
    return rules


def completed_epochs(record: CommitRecord) -> int:
    """How many epochs lie behind a checkpoint."""
    return record.position.epoch + (record.position.phase == "epoch_done")


def age_of(record: CommitRecord, now: datetime) -> float:
    """Seconds since the checkpoint was made; never negative, whatever the clocks say."""
    return max(0.0, (now - _created(record)).total_seconds())


def readable_duration(seconds: float) -> str:
    """``1h``, ``30d``, ``90m``, ``45s``: in its largest whole unit."""
    for length, unit in _UNITS:
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"


def _created(record: CommitRecord) -> datetime:
    return datetime.fromisoformat(record.created_at)


def _first_of_each(
    records: Iterable[CommitRecord], count: int, measure: Callable[[CommitRecord], int], unit: str
) -> dict[str, str]:
    kept: dict[str, str] = {}
    taken = {0}  # what lies before the first multiple
    for record in sorted(records, key=lambda r: (r.checkpoint.attempt, r.checkpoint.sequence)):
        multiple = measure(record) // count
        if multiple not in taken:
            taken.add(multiple)
            kept[record.id] = f"first at or after {multiple * count} {unit}"
    return kept
