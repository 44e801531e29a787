"""Metrics of the run: sent once, read back for replay, found again for a checkpoint."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric

from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.types import MetricRow

__all__ = ["OWN_PREFIX", "ROWS_PER_CALL", "RunMetrics"]

OWN_PREFIX = "ckpt/"
"""Metrics that this package adds for each checkpoint."""

ROWS_PER_CALL = 1000
_KEY_TAG = "ckpt.metric/"  # + MLflow's key: the name that it stands for
_REMEMBERED = 2000


class RunMetrics:
    """Metrics of one run.

    Parameters
    ----------
    client
        Of MLflow.
    run_id
        The run's id.
    tags
        The run's tags; they tell which keys stand for names that MLflow refuses.
    """

    def __init__(self, client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
        self._client = client
        self._run_id = run_id
        self._names = _names_of_keys(tags)
        self._recent: dict[str, deque[MetricRow]] = {}
        self._read: dict[str, list[MetricRow]] = {}

    def log(self, rows: Sequence[MetricRow]) -> None:
        """Send rows. The server drops a row that equals one it has in every field."""
        self._name_keys({row.key for row in rows})
        for start in range(0, len(rows), ROWS_PER_CALL):
            batch = rows[start : start + ROWS_PER_CALL]
            metrics = [_metric(row) for row in batch]
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            self._remember(batch)

    def high_water(self) -> dict[str, int]:
        """Highest step of each metric that `log` sent, in any attempt."""
        data = self._client.get_run(self._run_id).data
        self._names = _names_of_keys(data.tags)
        # The latest values are those of the highest step; only the message shows their steps.
        return {
            self._names.get(metric.key, metric.key): int(metric.step)
            for metric in data.to_proto().metrics
            if not metric.key.startswith(OWN_PREFIX)
        }

    def history(self, key: str, after_step: int) -> list[MetricRow]:
        """Rows of `key` with a step greater than `after_step`."""
        rows = [row for row in self._all_rows(key) if row.step > after_step]
        self._remember(rows)
        return rows

    def at(self, key: str, value: float, step: int) -> MetricRow | None:
        """The newest row of `key` up to `step`, if the run holds it with this value.

        It lets a checkpoint show the metric without a second row in the run.
        """
        row = _newest(self._recent.get(key, ()), step)
        if row is None:
            if key not in self._read:
                self._read[key] = self._all_rows(key)
            row = _newest(self._read[key], step)
        return row if row is not None and row.value == value else None

    def _all_rows(self, key: str) -> list[MetricRow]:
        return [
            MetricRow(key, _value(metric.value), int(metric.step), int(metric.timestamp))
            for metric in self._client.get_metric_history(self._run_id, names.key(key))
        ]

    def _remember(self, rows: Iterable[MetricRow]) -> None:
        for row in rows:
            self._recent.setdefault(row.key, deque(maxlen=_REMEMBERED)).append(row)

    def _name_keys(self, wanted: Iterable[str]) -> None:
        """Record which name a changed key stands for, before the first row under it."""
        for name in wanted:
            key = names.key(name)
            if key != name and self._names.get(key) != name:
                tag = names.text_value(name, names.MAX_TAG)
                self._client.set_tag(self._run_id, f"{_KEY_TAG}{key}", tag)
                self._names[key] = name


def _names_of_keys(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        tag.removeprefix(_KEY_TAG): name for tag, name in tags.items() if tag.startswith(_KEY_TAG)
    }


def _metric(row: MetricRow) -> Metric:
    return Metric(names.key(row.key), float(row.value), row.time_ms, row.step)


def _value(value: float) -> float:
    """Undo MLflow's storing of infinities as the largest float."""
    if abs(value) >= sys.float_info.max:
        return math.copysign(math.inf, value)
    return float(value)


def _newest(rows: Iterable[MetricRow], step: int) -> MetricRow | None:
    below = [row for row in rows if row.step <= step]
    return max(below, key=lambda row: (row.step, row.time_ms), default=None)
