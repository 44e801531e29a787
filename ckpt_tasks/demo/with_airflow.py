"""The digits classifier as an Airflow DAG, its trainer killed on its way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ckpt_tasks.demo import viewer
from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.airflow_api import AirflowApi
from ckpt_tasks.demo.airflow_server import airflow_server
from ckpt_tasks.demo.processes import wait_until
from ckpt_tasks.demo.stage import Stage
from ckpt_tasks.errors import CkptTasksError

__all__ = ["WithAirflow"]

_DAGS = Path(__file__).parent / "dags"
_DAG = "train-digits"
_PARSE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_OPERATORS = "airflow.task.operators."
_UNTOLD_TASKS = ("report",)


class WithAirflow:
    """Triggers the DAG through the REST API of an Airflow of its own."""

    name = "Airflow"
    title = "an Airflow DAG"
    options: tuple[str, ...] = ("--airflow",)
    home = "airflow"

    @contextlib.contextmanager
    def show(self, stage: Stage) -> Iterator[list[int]]:
        """Run it to its end; yields the numbers of the killed attempts.

        Where a person watches, Airflow stays up until they have seen its pages.
        """
        say = stage.account.say
        with self._server(stage) as api:
            until = "" if viewer.is_there() else ", until the end of the demo"
            say("airflow", f"is up{until}: {api.url}")
            wait_until(lambda: api.has_dag(_DAG), (), within=_PARSE_SECONDS, what=f"DAG {_DAG}")
            with stage.killing() as killed:
                self._run_dag(api, stage)
            yield killed
            if viewer.is_there():
                say("airflow", f"still up: {api.url}; Enter ends it")
                viewer.wait_until_seen()
            say("airflow", "ending")

    def look(self, stage: Stage) -> None:
        """Start its Airflow again, until its pages have been seen."""
        with self._server(stage) as api:
            stage.account.say("airflow", f"is up: {api.dag_page(_DAG)}; Ctrl-C ends it")
            viewer.wait_until_seen()

    def _server(self, stage: Stage) -> AbstractContextManager[AirflowApi]:
        settings = {
            "CKPT_TASKS_STORE_URL": stage.store_url,
            "CKPT_TASKS_REGISTRY_TRACKING_URI": stage.tracking_uri,
            "CKPT_TASKS_REGISTRY_EXPERIMENT": "digits",
            "CKPT_TASKS_REGISTRY_BEST": "val_accuracy:max",
        }
        stage.account.say("airflow", "starting, which takes half a minute")
        return airflow_server(stage.folder / self.home, _DAGS, settings)

    def _run_dag(self, api: AirflowApi, stage: Stage) -> None:
        say = stage.account.say
        run_id = api.trigger(_DAG, {})
        page = api.run_page(_DAG, run_id)
        say("airflow", f"DAG run triggered: {page if viewer.is_there() else run_id}")
        follower = _Follower(api, stage.account, run_id)
        while (state := api.state(_DAG, run_id)) not in ("success", "failed"):
            follower.tell()
            time.sleep(_POLL_SECONDS)
        follower.tell()
        say("airflow", f"DAG run: {state}")
        if state != "success":
            logs = stage.folder / self.home / "logs"
            raise CkptTasksError(f"the DAG run {run_id} failed; see {logs}")


class _Follower:
    """Tells what the tasks of a DAG run log, each line once, as it comes."""

    def __init__(self, api: AirflowApi, account: Account, run_id: str) -> None:
        self._api = api
        self._account = account
        self._run_id = run_id
        self._told: dict[tuple[str, int], int] = {}
        self._retries: set[tuple[str, int]] = set()

    def tell(self) -> None:
        """Tell what is new."""
        for task in self._api.task_instances(_DAG, self._run_id):
            if task["task_id"] not in _UNTOLD_TASKS:
                self._tell_task(task)

    def _tell_task(self, task: dict[str, Any]) -> None:
        name, tries = task["task_id"], task["try_number"]
        started = tries if task["start_date"] is not None else tries - 1
        for number in range(max(1, started - 1), started + 1):
            self._tell_try(name, number)
            failed = number < tries or task["state"] == "up_for_retry"
            if failed and (name, number) not in self._retries:
                self._retries.add((name, number))
                self._account.say("airflow", f"task {name} will be retried: try {number + 1}")

    def _tell_try(self, name: str, number: int) -> None:
        # Only of these: what Airflow writes above them changes while the task runs.
        log = self._api.log(_DAG, self._run_id, name, number)
        lines = [line for line in log if line.is_exception or line.logger.startswith(_OPERATORS)]
        for line in lines[self._told.get((name, number), 0) :]:
            if line.is_exception:
                self._account.say(name, line.text.partition(": ")[2])
            else:
                self._account.relay(name, line.text)
        self._told[name, number] = len(lines)
