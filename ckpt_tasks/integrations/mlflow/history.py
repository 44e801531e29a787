"""Rows of one metric in a range of steps, without reading its whole history.

The public client has only `get_metric_history`, which holds every row of a metric at once, and asks
for them in pages from the oldest on. What MLflow's own pages ask, *get-history-bulk-interval*,
takes a range; in a long one it samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

__all__ = ["MAX_ROWS", "HistoryReader", "Point"]

Point = tuple[float, int, int]
"""Value, step, and time in milliseconds."""

MAX_ROWS = 2500
"""Of one request: the server's limit (``MAX_RESULTS_PER_RUN`` of `mlflow.server.handlers`)."""

_ENDPOINT = "/api/2.0/mlflow/metrics/get-history-bulk-interval"


class HistoryReader:
    """Reads metrics of one run.

    Parameters
    ----------
    tracking_uri
        Of the server, which is asked directly; ``None`` for a database that the client opens.
    """

    def __init__(self, client: MlflowClient, run_id: str, tracking_uri: str | None) -> None:
        self._client = client
        self._run_id = run_id
        self._tracking_uri = tracking_uri
        self._has_intervals = True

    def all(self, key: str) -> Iterator[Point]:
        """Every row of MLflow's `key`."""
        for metric in self._client.get_metric_history(self._run_id, key):
            yield metric.value, metric.step, metric.timestamp

    def between(self, key: str, first: int, last: int) -> list[Point]:
        """Rows of MLflow's `key` from step `first` to step `last`, both included."""
        if self._has_intervals:
            try:
                return list(self._complete(key, first, last))
            except MlflowException as error:
                if error.error_code != "ENDPOINT_NOT_FOUND":
                    raise
                self._has_intervals = False  # of another kind of server
        return [point for point in self.all(key) if first <= point[1] <= last]

    def _complete(self, key: str, first: int, last: int) -> Iterator[Point]:
        """As many answers as may be a sample are asked for again, in halves."""
        points = self._ask(key, first, last)
        if len(points) < MAX_ROWS or first == last:
            yield from points
            return
        middle = (first + last) // 2
        yield from self._complete(key, first, middle)
        yield from self._complete(key, middle + 1, last)

    def _ask(self, key: str, first: int, last: int) -> list[Point]:
        if self._tracking_uri is None:
            return self._ask_database(key, first, last)
        parameters = {
            "run_ids": [self._run_id],
            "metric_key": key,
            "start_step": first,
            "end_step": last,
            "max_results": MAX_ROWS,
        }
        creds = get_default_host_creds(self._tracking_uri)  # type: ignore[no-untyped-call]
        response = http_request(  # type: ignore[no-untyped-call]
            creds, _ENDPOINT, "GET", params=parameters
        )
        answer: dict[str, Any] = verify_rest_response(response, _ENDPOINT).json()
        return [
            (float(m["value"]), int(m.get("step", 0)), int(m["timestamp"]))
            for m in answer.get("metrics", [])
        ]

    def _ask_database(self, key: str, first: int, last: int) -> list[Point]:
        store = self._client._tracking_client.store
        assert isinstance(store, SqlAlchemyStore)
        found = store.get_metric_history_bulk_interval(
            [self._run_id], key, MAX_ROWS, start_step=first, end_step=last
        )
        return [(metric.value, metric.step, metric.timestamp) for metric in found]
