"""Metrics of the run: sent once, read back for replay, found again for a checkpoint."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric

from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.history import HistoryReader, Point
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
    history
        Reads rows.
    """

    def __init__(
        self, client: MlflowClient, run_id: str, tags: Mapping[str, str], history: HistoryReader
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._history = history
        self._names = _names_of_keys(tags)
        self._recent: dict[str, deque[MetricRow]] = {}

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

    def history(self, key: str, after_step: int, last_step: int | None) -> list[MetricRow]:
        """Rows of `key` with a step greater than `after_step`, up to `last_step`."""
        if last_step is None:
            found = self._history.all(names.key(key))
            rows = [_row(key, point) for point in found if point[1] > after_step]
        else:
            between = self._history.between(names.key(key), after_step + 1, last_step)
            rows = [_row(key, point) for point in between]
        self._remember(rows)
        return rows

    def at(self, key: str, value: float, step: int) -> MetricRow | None:
        """The newest row of `key` up to `step`, if the run holds it with this value.

        It lets a checkpoint show the metric without a second row in the run. Commit records have
        values of their own step, which is asked for; rows of earlier ones count where remembered.
        """
        rows: list[MetricRow] = [r for r in self._recent.get(key, ()) if r.step <= step]
        if all(row.step < step for row in rows):
            rows += self.history(key, step - 1, step)
        row = max(rows, key=lambda row: (row.step, row.time_ms), default=None)
        return row if row is not None and row.value == value else None

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


def _row(key: str, point: Point) -> MetricRow:
    value, step, time_ms = point
    return MetricRow(key, _value(value), int(step), int(time_ms))
