from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import PrefectHTTPStatusError
from support.prefect_runs import client, task_runs, wait_for_state
from support.prefect_server import PrefectServer, ProcessGroup

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.store import open_store

pytestmark = pytest.mark.timeout(240)

REPOSITORY = Path(__file__).parents[3]
POOL = "training"
PREFECT_FILE = "deployments/prefect.yaml"


@pytest.fixture(scope="module")
def deployment(prefect_api: PrefectServer) -> DeploymentResponse:
    """What ``prefect deploy --all`` makes of the repository's own file."""
    prefect_api.run_cli("prefect", "work-pool", "create", POOL, "--type", "process", cwd=REPOSITORY)
    prefect_api.run_cli(
        "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", PREFECT_FILE, cwd=REPOSITORY
    )
    with client() as api:
        return api.read_deployment_by_name("train-digits/digits")


@pytest.fixture
def worker(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[ProcessGroup]:
    environment = prefect_api.process_environment(
        CKPT_TASKS_STORE_URL=str(tmp_path / "store"),
        CKPT_TASKS_SCHEDULE_EVERY_STEPS="1000000",
        OMP_NUM_THREADS="1",
    )
    with ProcessGroup(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
        env=environment,
        cwd=tmp_path,
        log=tmp_path / "worker.log",
    ) as group:
        yield group


def test_deploy_takes_tag_schedule_and_form(deployment: DeploymentResponse) -> None:
    """The deployment has the automations' tag, a paused schedule, and a form with types."""
    properties = (deployment.parameter_openapi_schema or {})["properties"]

    assert deployment.tags == ["ckpt-tasks"]
    assert [schedule.active for schedule in deployment.schedules] == [False]
    assert deployment.enforce_parameter_schema
    assert (properties["lr"]["type"], properties["epochs"]["type"]) == ("number", "integer")
    assert list(properties)[-1] == "resume"


def test_maintenance_is_deployed_for_each_night(deployment: DeploymentResponse) -> None:
    """Beside the training, without the automations' tag; a trigger sets nothing but a dry run."""
    with client() as api:
        found = api.read_deployment_by_name("maintain/nightly")

    assert (found.tags, [schedule.active for schedule in found.schedules]) == ([], [True])
    assert list((found.parameter_openapi_schema or {})["properties"]) == ["dry_run"]


@pytest.mark.parametrize("wrong", [{"lr": "fast"}, {"resume": "newest"}])
def test_trigger_with_a_wrong_parameter_is_refused(
    deployment: DeploymentResponse, wrong: dict[str, Any]
) -> None:
    """The server checks a trigger against the form: no flow run is made, so no retry is spent."""
    with client() as api, pytest.raises(PrefectHTTPStatusError, match=r"409|422"):
        api.create_flow_run_from_deployment(deployment.id, parameters=wrong)


def test_worker_trains_the_deployment(
    deployment: DeploymentResponse, worker: ProcessGroup, tmp_path: Path
) -> None:
    """A process worker runs the deployed flow to its end, each step a task run in order.

    The configuration is the flow process's: job variables win over the worker's environment.
    """
    variables = {"env": {"CKPT_TASKS_SCHEDULE_EVERY_STEPS": "40"}}
    with client() as api:
        run = api.create_flow_run_from_deployment(
            deployment.id, parameters={"epochs": 1}, job_variables=variables
        )

    done = wait_for_state(run.id, "Completed", "Failed", "Crashed", timeout=120, log=worker.log)

    assert done.state_name == "Completed", worker.output()[-6000:]
    steps = [task_run.name.rpartition("-")[0] for task_run in task_runs(run.id)]
    assert steps == ["resolve run", "recover", "train", "verify", "publish report"]
    seen = view_run(open_store(str(tmp_path / "store")), f"train-digits-{run.id}")
    assert seen.completed
    assert "steps" in {c.record.trigger for c in seen.checkpoints if c.record}
