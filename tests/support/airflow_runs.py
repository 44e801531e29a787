"""A real Airflow for tests, what they ask it about DAG runs, and ways to kill a run's processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
from mlflow import MlflowClient
from support.run_checks import check_run
from support.shell import COMMAND
from support.toy_runs import toy_spec

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.demo.airflow_api import AirflowApi, LogLine
from ckpt_tasks.demo.airflow_server import airflow_server
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.store import open_store

T = TypeVar("T")

TESTS = Path(__file__).parents[1]
DAGS = TESTS / "support" / "airflow_dags"
SHIPPED_DAGS = TESTS.parent / "dags"
STEPS = 32  # four epochs of eight steps
PACE = 0.25
"""Seconds a step, when a run is to be caught on its way."""

SETTINGS = {
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "1",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "10",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TESTS),
}


@dataclasses.dataclass(frozen=True)
class Airflow:
    """A running Airflow that trains into one store and one MLflow."""

    api: AirflowApi
    store: str
    tracking_uri: str

    def trigger(
        self, folder: Path, dag_id: str = "quick", *, pace: float = PACE, **conf: Any
    ) -> DagRun:
        """Trigger a DAG run of the toy, whose traces go to `folder`."""
        environment = toy_environment(folder, pace)
        run_id = change(lambda: self.api.trigger(dag_id, {"environment": environment, **conf}))
        return DagRun(self, folder, dag_id, run_id, conf.get("run_name", f"{dag_id}-{run_id}"))


@contextlib.contextmanager
def running_airflow(folder: Path, tracking_uri: str) -> Iterator[Airflow]:
    """Start one, the toy DAGs and the shipped ones parsed; end it with all its processes."""
    store = str(folder / "store")
    settings = {
        **SETTINGS,
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": bundles(toy=DAGS, shipped=SHIPPED_DAGS),
        "CKPT_TASKS_STORE_URL": store,
        "CKPT_TASKS_REGISTRY_TRACKING_URI": tracking_uri,
        "CKPT_TASKS_REGISTRY_EXPERIMENT": "toy",
        "CKPT_TASKS_REGISTRY_BEST": "loss:min",
        "CKPT_TASKS_DASHBOARD_URL": "https://dashboard.example.org/runs/{run}",
    }
    with airflow_server(folder / "airflow", DAGS, settings) as api:
        for dag_id in ("wrong", "evaluate-digits"):
            wait_until(lambda dag=dag_id: api.has_dag(dag), timeout=60, what=f"{dag_id} is parsed")
        yield Airflow(api, store, tracking_uri)


def bundles(**folders: Path) -> str:
    """DAG bundles that are plain folders, as Airflow's configuration lists them."""
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return json.dumps(
        [
            {"name": name, "classpath": local, "kwargs": {"path": str(folder)}}
            for name, folder in folders.items()
        ]
    )


@dataclasses.dataclass(frozen=True)
class DagRun:
    """One DAG run of the toy: the training run `run`, its task, its processes."""

    airflow: Airflow
    folder: Path
    dag_id: str
    run_id: str
    run: str

    @property
    def state(self) -> str:
        return self.airflow.api.state(self.dag_id, self.run_id)

    @property
    def _path(self) -> str:
        return f"dags/{self.dag_id}/dagRuns/{self.run_id}"

    @property
    def digest(self) -> str:
        """Of the final state, as the training itself has written it."""
        return (self.folder / "digest").read_text("ascii")

    def wait_for_state(self, *states: str, timeout: float = 120) -> str:
        """Wait until the DAG run is in one of `states`; returns which."""
        try:
            return wait_until(
                lambda: self.state if self.state in states else None,
                timeout=timeout,
                what=f"{self.run_id} is {states}",
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def wait_for_task(self, *states: str, task_id: str = "train", timeout: float = 60) -> None:
        """Wait until a task is in one of `states`."""
        wait_until(
            lambda: self.task(task_id)["state"] in states,
            timeout=timeout,
            what=f"{task_id} is {states}",
        )

    def task(self, task_id: str = "train") -> dict[str, Any]:
        """The newest try of a task, as the API tells it."""
        found = self.airflow.api.task_instances(self.dag_id, self.run_id)
        return next(task for task in found if task["task_id"] == task_id)

    def set_state(self, state: str, task_id: str = "train") -> None:
        """Mark a task as the UI's button does."""
        path = f"{self._path}/taskInstances/{task_id}"
        change(lambda: self.airflow.api.call("PATCH", path, {"new_state": state}))

    def clear(self, task_id: str = "train") -> None:
        """Clear a task, and what comes after it, as the UI's button does."""
        which = {"dag_run_id": self.run_id, "task_ids": [task_id], "include_downstream": True}
        options = {"dry_run": False, "only_failed": False, "reset_dag_runs": True}
        path = f"dags/{self.dag_id}/clearTaskInstances"
        change(lambda: self.airflow.api.call("POST", path, {**which, **options}))

    def links(self, task_id: str = "train") -> dict[str, str | None]:
        """Address behind each of a task's buttons."""
        answer = self.airflow.api.call("GET", f"{self._path}/taskInstances/{task_id}/links")
        links: dict[str, str | None] = answer["extra_links"]
        return links

    def pointer(self, task_id: str = "train") -> dict[str, Any]:
        """What the task's state store says of the newest checkpoint."""
        path = f"{self._path}/taskInstances/{task_id}/state-store/ckpt_tasks"
        value: dict[str, Any] = self.airflow.api.call("GET", path)["value"]
        return value

    def asset_event(self, name: str) -> dict[str, Any]:
        """What the only event of this DAG run on an asset says."""
        found = self.airflow.api.call("GET", "assets/events", source_run_id=self.run_id)
        events = [event for event in found["asset_events"] if event["name"] == name]
        (event,) = events
        extra: dict[str, Any] = event["extra"]
        return extra

    def followed_by(self, dag_id: str) -> DagRun:
        """The first DAG run that an asset's event has started, at its end."""
        path = f"dags/{dag_id}/dagRuns"

        def ended() -> str | None:
            found = self.airflow.api.call("GET", path, order_by="run_after")["dag_runs"]
            started = [run for run in found if run["run_type"] == "asset_triggered"]
            done = bool(started) and started[0]["state"] in ("success", "failed")
            return started[0]["dag_run_id"] if done else None

        run_id = wait_until(ended, timeout=60, what=f"{dag_id} was started by an asset and ended")
        return dataclasses.replace(self, dag_id=dag_id, run_id=run_id)

    def xcom(self, task_id: str) -> Any:
        """What a task has returned."""
        path = f"{self._path}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.airflow.api.call("GET", path, deserialize="true")["value"]

    def log(self, task_id: str = "train", try_number: int = 1) -> list[str]:
        """Lines that a try has logged, those of exceptions among them."""
        return [line.text for line in self.log_lines(task_id, try_number)]

    def log_lines(self, task_id: str = "train", try_number: int = 1) -> list[LogLine]:
        """As `log`, with the lines' levels."""
        return self.airflow.api.log(self.dag_id, self.run_id, task_id, try_number)

    def told(self) -> str:
        """Everything that the tries of the train task have logged, for a failed test."""
        tries = range(1, self.task()["try_number"] + 1)
        lines = (f"{number}: {line}" for number in tries for line in self.log(try_number=number))
        return "\n".join(lines)

    def view(self) -> RunView:
        """The training run as its store has it."""
        with open_store(self.airflow.store) as store:
            return view_run(store, self.run)


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a training task, found above its trainer."""

    trainer: int
    task: int
    """Runs the operator."""
    supervisor: int
    """Airflow's: tells the API that the task lives and how it ended."""

    @classmethod
    def above(cls, trainer: int) -> Processes:
        """Those of the task that has started `trainer` through the training's supervisor."""
        _training_supervisor, task, supervisor = psutil.Process(trainer).parents()[:3]
        return cls(trainer=trainer, task=task.pid, supervisor=supervisor.pid)


def change(call: Callable[[], T]) -> T:
    """Make a change; again where Airflow answers 500, as its SQLite was too busy for it."""
    for _ in range(10):
        try:
            return call()
        except CkptTasksError as error:
            if "Database error" not in str(error):
                raise
            time.sleep(1)
    return call()


def wait_until(condition: Callable[[], T | None], *, timeout: float, what: str) -> T:
    """Poll `condition` until it returns something true, and return that.

    Not often: what answers shares its processors with the training that is waited for.
    """
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s")
        time.sleep(0.4)
    return found


def kill(*pids: int) -> None:
    """SIGKILL, all at once."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Have a process stand still within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def train_in_shell(
    airflow: Airflow, folder: Path, run: str, *, pace: float, invocation: str = "shell"
) -> subprocess.Popen[bytes]:
    """Start ``ckpt-tasks train`` on a run of Airflow's, its traces in the same `folder`."""
    return subprocess.Popen(
        [
            *(COMMAND, "train", "support.toy_training:train", "--run", run),
            *("--store", airflow.store, "--tracking-uri", airflow.tracking_uri),
            *("--experiment", "toy", "--every-steps", "3", "--invocation", invocation),
        ],
        env={**os.environ, **SETTINGS, **toy_environment(folder, pace)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


def toy_environment(folder: Path, pace: float) -> dict[str, str]:
    """What the toy is told: where its traces go, and how long a step takes, in seconds."""
    return {
        "TOY_DIGEST": str(folder / "digest"),
        "TOY_TRACE": str(folder / "trace"),
        "TOY_STEP_SECONDS": str(pace),
    }


def steps_done(folder: Path) -> list[tuple[int, int]]:
    """``(pid, step)`` of every step that the toy has really executed, in order."""
    trace = folder / "trace"
    if not trace.exists():
        return []
    lines = trace.read_text("ascii").splitlines()
    return [(int(pid), int(step)) for pid, step in (line.split() for line in lines)]


def wait_for_step(folder: Path, step: int) -> int:
    """Wait until a trainer has done `step`; returns that trainer's pid."""

    def trainer() -> int | None:
        return next((pid for pid, done in steps_done(folder) if done >= step), None)

    return wait_until(trainer, timeout=60, what=f"step {step}")


def uninterrupted_digest(folder: Path) -> str:
    """Digest of the toy's final state when it is trained here, plainly, and nothing is killed.

    Its variables must be in the environment: ``TOY_DIGEST``, and ``PYTHONPATH`` of the tests.
    """
    tasks.train(toy_spec(folder / "store", params={}))
    return Path(os.environ["TOY_DIGEST"]).read_text("ascii")


def assert_one_whole_run(run: DagRun, digest: str, *, attempts: int) -> None:
    """One training run, resumed as expected, its state and metrics those of a run never killed."""
    view = run.view()
    assert len(view.attempts) == attempts
    valid = {str(c) for c in check_run(toy_spec(run.airflow.store, run=run.run), steps=STEPS)}
    for attempt in view.attempts[1:]:
        assert attempt.resumed is not None
        assert attempt.resumed.checkpoint in valid
    assert run.digest == digest
    assert_one_mlflow_run(run.airflow.tracking_uri, view.run.uid)


def assert_one_mlflow_run(tracking_uri: str, uid: str) -> str:
    """MLflow holds one run of this training run, finished, with every step's loss once.

    Returns its id.
    """
    mlflow = MlflowClient(tracking_uri=tracking_uri)
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    found = mlflow.search_runs(experiments, f"tags.`ckpt.uid` = '{uid}'")
    assert [run.info.status for run in found] == ["FINISHED"]
    history = mlflow.get_metric_history(found[0].info.run_id, "loss")
    assert Counter(metric.step for metric in history) == Counter(range(1, STEPS + 1))
    return str(found[0].info.run_id)


def registered_checkpoints(tracking_uri: str, mlflow_run: str) -> Counter[str]:
    """Ids of the checkpoints that a run has as versions in MLflow, and how often each."""
    mlflow = MlflowClient(tracking_uri=tracking_uri)
    versions = mlflow.search_model_versions(f"run_id = '{mlflow_run}'")
    ids = (str(version.source).removeprefix("models:/") for version in versions)
    models = (mlflow.get_logged_model(model_id) for model_id in ids)
    return Counter(str(model.tags["ckpt.checkpoint"]) for model in models)
