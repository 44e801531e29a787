"""What tests ask a Prefect server about flow runs, and the served toy deployment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
from prefect.states import Cancelling
from support.prefect_server import PrefectServer, ProcessGroup, wait_until

TESTS = Path(__file__).parents[1]


class ServedToy:
    """The toy training as a served deployment, and ways to look at it and to kill it.

    Parameters
    ----------
    server
        Where it is deployed.
    folder
        Takes store, MLflow's database, trace, digest and logs.
    name
        Of the deployment; unique on the server.
    """

    def __init__(self, server: PrefectServer, folder: Path, name: str, **environment: str) -> None:
        self.server = server
        self.folder = folder
        self.name = name
        self.store = str(folder / "store")
        self.tracking_uri = f"sqlite:///{folder}/mlflow.db"
        self.digest = folder / "digest"
        self.trace = folder / "trace"
        self.environment = {
            "TOY_NAME": name,
            "TOY_STORE": self.store,
            "TOY_RUN_NAME": "{flow_name}-{flow_run_id}",
            "TOY_MLFLOW": self.tracking_uri,
            "TOY_EXPERIMENT": "ckpt_tasks",
            "TOY_DIGEST": str(self.digest),
            "TOY_TRACE": str(self.trace),
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.runner = self.start_runner()

    def start_runner(self) -> ProcessGroup:
        """Serve it; returns once the server knows the deployment."""
        runner = self.server.start_script(
            TESTS / "support" / "serve_toy.py", log=self.folder / "runner.log", **self.environment
        )
        served = "Your flow 'toy' is being served"
        wait_until(
            lambda: served in runner.output() or runner.process.poll() is not None,
            timeout=60,
            what=f"{self.name} is served",
        )
        assert runner.process.poll() is None, runner.output()
        self.runner = runner
        return runner

    def trigger(self, **parameters: Any) -> UUID:
        """Create a flow run; the runner picks it up."""
        with client() as api:
            created = api.create_flow_run_from_deployment(self.deployment(), parameters=parameters)
        return created.id

    def cancel(self, flow_run: UUID) -> None:
        """Cancel a flow run, as the UI's button does."""
        with client() as api:
            api.set_flow_run_state(flow_run, Cancelling(), force=True)

    def deployment(self) -> UUID:
        """The deployment's id."""
        with client() as api:
            return api.read_deployment_by_name(f"toy/{self.name}").id

    def steps_done(self) -> list[tuple[int, int]]:
        """``(pid, step)`` of every step that was really executed, in order."""
        if not self.trace.exists():
            return []
        lines = self.trace.read_text(encoding="ascii").splitlines()
        return [(int(pid), int(step)) for pid, step in (line.split() for line in lines)]

    def wait_for_step(self, step: int) -> int:
        """Wait until a trainer has done `step`; returns that trainer's pid."""

        def trainer() -> int | None:
            return next((pid for pid, done in self.steps_done() if done >= step), None)

        return wait_until(trainer, timeout=60, what=f"step {step}\n{self.runner.output()[-3000:]}")

    def flow_process(self, trainer: int) -> int:
        """The pid of the flow run's own process: the runner's child above the trainer."""
        for process in psutil.Process(trainer).parents():
            if process.ppid() == self.runner.pid:
                return int(process.pid)
        raise AssertionError(f"trainer {trainer} does not descend from the runner")

    def kill(self, *pids: int) -> None:
        """SIGKILL, all at once."""
        for pid in pids:
            os.kill(pid, 9)


def client() -> SyncPrefectClient:
    return get_client(sync_client=True)


def wait_for_state(flow_run: UUID, *states: str, timeout: float = 90, log: Path) -> FlowRun:
    """Wait until the flow run is in a state of one of these names, Completed and Failed say."""

    def reached() -> FlowRun | None:
        with client() as api:
            found = api.read_flow_run(flow_run)
        return found if found.state_name in states else None

    try:
        return wait_until(reached, timeout=timeout, what=f"flow run is {states}")
    except AssertionError as error:
        output = log.read_text(encoding="utf-8", errors="replace")[-6000:]
        raise AssertionError(f"{error}\n{output}") from error


def task_runs(flow_run: UUID) -> list[TaskRun]:
    """Task runs of a flow run, in the order in which they began."""
    with client() as api:
        found = api.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
        )
    return sorted(found, key=lambda run: run.created)


def artifacts(flow_run: UUID) -> dict[str, list[Artifact]]:
    """Artifacts of a flow run, by the first word of their key."""
    with client() as api:
        found = api.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        )
    by_kind: dict[str, list[Artifact]] = {}
    for artifact in found:
        by_kind.setdefault((artifact.key or "").partition("-")[0], []).append(artifact)
    return by_kind


def table(artifact: Artifact) -> Sequence[dict[str, Any]]:
    """Rows of a table artifact."""
    rows: list[dict[str, Any]] = json.loads(str(artifact.data))
    return rows


def events(server: PrefectServer, name: str, *, related: str) -> list[dict[str, Any]]:
    """The newest 50 events of this name that are related to the resource `related`."""
    answer = httpx.post(
        f"{server.api_url}/events/filter",
        json={"filter": {"event": {"name": [name]}, "related": {"id": [related]}}, "limit": 50},
        timeout=10,
    )
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["events"]
    return found
