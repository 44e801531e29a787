"""The determinism audit: steps done again after a resume, compared with what was logged first.

Nobody but the registrar knows both values: training has forgotten the first ones with the attempt
that died. Rows come in the order of their steps, so that counting needs no memory of them; of the
first values a window of steps is held, which moves with the replay.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ckpt_tasks.replay import MAX_KEYS, Divergence, Replay, is_identical
from ckpt_tasks.types import MetricRow, finite_or_text

__all__ = ["FirstValues", "ReplayAudit"]

History = Callable[[str, int, int], Sequence[MetricRow]]
"""Rows of a metric from one step to another, both included."""

_HELD_ROWS = 100_000  # some 20 MB
_LONGEST_WINDOW, _SHORTEST_WINDOW = 1000, 10  # steps
_LONGEST_KEY = 250


class FirstValues:
    """The rows that were logged before an attempt began, read as far as they are asked for.

    Parameters
    ----------
    history
        Reads them.
    bounds
        The highest step of each metric that was logged before.
    """

    def __init__(self, history: History, bounds: Mapping[str, int]) -> None:
        self._history = history
        self._bounds = bounds
        self._steps = max(_SHORTEST_WINDOW, min(_LONGEST_WINDOW, _HELD_ROWS // max(1, len(bounds))))
        self._windows: dict[str, tuple[range, dict[int, MetricRow]]] = {}
        self.last_step = max(bounds.values(), default=-1)
        """No metric has a row of a later step."""

    def bounds(self, row: MetricRow) -> bool:
        """Whether the metric has rows of this step or a later one."""
        return row.step <= self._bounds.get(row.key, -1)

    def find(self, row: MetricRow) -> MetricRow | None:
        """What was logged first for the row's metric and step; raises as the history does."""
        if not self.bounds(row):
            return None
        steps, rows = self._windows.get(row.key, (range(0), {}))
        if row.step not in steps:
            last = min(row.step + self._steps - 1, self._bounds[row.key])
            rows = _earliest(self._history(row.key, row.step, last))
            self._windows[row.key] = range(row.step, last + 1), rows
        return rows.get(row.step)


def _earliest(rows: Sequence[MetricRow]) -> dict[int, MetricRow]:
    found: dict[int, MetricRow] = {}
    for row in rows:
        known = found.setdefault(row.step, row)
        if row.time_ms < known.time_ms:
            found[row.step] = row
    return found


class ReplayAudit:
    """Counts replayed values, and those of them that came out differently."""

    def __init__(self) -> None:
        self._steps = self._values = self._diverged_steps = 0
        self._step = self._diverged_step = -1  # counted last
        self._keys: Counter[str] = Counter()
        self._first: Divergence | None = None
        self._largest: Divergence | None = None
        self._largest_relative: Divergence | None = None

    @property
    def replay(self) -> Replay:
        """What has been found until now."""
        most = heapq.nsmallest(MAX_KEYS, self._keys.items(), key=lambda item: (-item[1], item[0]))
        return Replay(
            steps=self._steps,
            values=self._values,
            diverged_steps=self._diverged_steps,
            diverged_values=self._keys.total(),
            first=self._first,
            largest=self._largest,
            largest_relative=self._largest_relative,
            keys={key[:_LONGEST_KEY]: count for key, count in most},
        )

    def compare(self, first: MetricRow, replayed: MetricRow) -> None:
        """Count a value; those of one step follow one another.

        A row that equals its first one to the millisecond is that one: an earlier registrar of
        this attempt has sent it.
        """
        identical = is_identical(first.value, replayed.value)
        if identical and first.time_ms == replayed.time_ms:
            return
        self._values += 1
        self._steps += replayed.step != self._step
        self._step = replayed.step
        if not identical:
            self._diverge(first, replayed)

    def _diverge(self, first: MetricRow, replayed: MetricRow) -> None:
        self._keys[replayed.key] += 1
        self._diverged_steps += replayed.step != self._diverged_step
        self._diverged_step = replayed.step
        found = Divergence(
            key=replayed.key[:_LONGEST_KEY],
            step=replayed.step,
            first=finite_or_text(first.value),
            replayed=finite_or_text(replayed.value),
        )
        self._first = self._first or found
        if self._largest is None or found.absolute > self._largest.absolute:
            self._largest = found
        if self._largest_relative is None or found.relative > self._largest_relative.relative:
            self._largest_relative = found
