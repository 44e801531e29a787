"""Airflow's REST API, as far as a person would use it to follow one DAG run."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from ckpt_tasks.errors import CkptTasksError

__all__ = ["AirflowApi", "LogLine"]

_TIMEOUT = 60.0


class LogLine(NamedTuple):
    """A line of a task's log."""

    level: str
    logger: str
    text: str
    is_exception: bool = False
    """An exception's class and message, below the line that it was logged with."""


class AirflowApi:
    """The API of a server that asks for no login.

    Source: https://airflow.apache.org/docs/apache-airflow/stable/stable-rest-api-ref.html

    Parameters
    ----------
    url
        Of the server; its pages lie there too.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Send a request.

        Parameters
        ----------
        method, path
            ``GET``, say, and what follows ``/api/v2/``.
        body
            Sent as JSON.

        Returns
        -------
        Any
            The answer's JSON.

        Raises
        ------
        CkptTasksError
            The server refused, or does not answer.
        """
        parameters = f"?{urlencode(query)}" if query else ""
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/api/v2/{quote(path)}{parameters}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", "replace")
            raise CkptTasksError(f"{method} {path}: {error.code} {detail}") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise CkptTasksError(f"{method} {path}: {error}") from error

    def has_dag(self, dag_id: str) -> bool:
        """Whether the DAG was parsed without an error and can be triggered."""
        dags = self.call("GET", "dags", dag_id_pattern=dag_id)["dags"]
        return any(dag["dag_id"] == dag_id and not dag["is_stale"] for dag in dags)

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Trigger a DAG run, as the UI's form does; returns its id."""
        created = self.call("POST", f"dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})
        return str(created["dag_run_id"])

    def state(self, dag_id: str, run_id: str) -> str:
        """State of a DAG run: ``queued``, ``running``, ``success`` or ``failed``."""
        return str(self.call("GET", f"dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """The newest try of each task of a DAG run."""
        path = f"dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        found: list[dict[str, Any]] = self.call("GET", path)["task_instances"]
        return found

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> list[LogLine]:
        """What a try of a task has logged so far."""
        path = f"dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        entries = self.call("GET", path, full_content="true")["content"]
        return [line for entry in entries for line in _lines(entry)]

    def dag_page(self, dag_id: str) -> str:
        """Address of a DAG's page."""
        return f"{self.url}/dags/{quote(dag_id)}"

    def run_page(self, dag_id: str, run_id: str) -> str:
        """Address of a DAG run's page."""
        return f"{self.dag_page(dag_id)}/runs/{quote(run_id)}"


def _lines(entry: dict[str, Any]) -> Iterator[LogLine]:
    logger = str(entry.get("logger") or "")
    yield LogLine(str(entry.get("level") or "info"), logger, str(entry["event"]))
    for error in entry.get("error_detail") or ():
        yield LogLine("error", logger, f"{error['exc_type']}: {error['exc_value']}", True)
