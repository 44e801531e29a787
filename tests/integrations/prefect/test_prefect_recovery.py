from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from support.prefect_runs import (
    ServedToy,
    artifacts,
    events,
    table,
    task_runs,
    wait_for_state,
)
from support.prefect_server import PrefectServer, wait_until

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.integrations.prefect import install_automations
from ckpt_tasks.store import open_store

pytestmark = pytest.mark.timeout(240)

STEPS = 32  # four epochs of eight steps
PACE = "0.25"


@pytest.fixture(scope="module")
def uninterrupted_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the toy training's final state when nothing is killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_DIGEST", str(folder / "digest"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        spec = tasks.resolve(
            "support.toy_training:train",
            run="uninterrupted",
            params={},
            config=CheckpointConfig(store=StoreConfig(url=str(folder / "store"))),
            invocation="uninterrupted",
        )
        tasks.train(spec)
    return (folder / "digest").read_text(encoding="ascii")


@pytest.fixture
def toy(
    prefect_api: PrefectServer,
    empty_mlflow: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[ServedToy]:
    environment: dict[str, str] = getattr(request, "param", {})
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    served = ServedToy(
        prefect_api, tmp_path, tmp_path.name, **{"TOY_STEP_SECONDS": PACE, **environment}
    )
    yield served
    served.runner.close()


def view(toy: ServedToy, flow_run: UUID) -> RunView:
    store = open_store(toy.store)
    return view_run(store, f"toy-{flow_run}")


def assert_one_whole_run(toy: ServedToy, flow_run: UUID, digest: str, *, attempts: int) -> None:
    """One training run, resumed as expected, its state and metrics those of a run never killed."""
    seen = view(toy, flow_run)
    assert seen.completed is not None
    assert len(seen.attempts) == attempts
    committed = {c.id for c in seen.checkpoints if c.standing == "valid"}
    for attempt in seen.attempts[1:]:
        assert attempt.resumed is not None
        assert attempt.resumed.checkpoint in committed
    assert toy.digest.read_text(encoding="ascii") == digest
    assert_artifacts(flow_run, committed)
    assert_one_mlflow_run(toy)


def assert_artifacts(flow_run: UUID, committed: set[str]) -> None:
    found = artifacts(flow_run)
    assert {kind: len(versions) for kind, versions in found.items()} == {
        "progress": 1,
        "checkpoints": 1,
        "registry": 1,
        "report": 1,
    }
    assert found["progress"][0].data == 100.0
    rows = table(found["checkpoints"][0])
    assert {row["checkpoint"] for row in rows} >= committed
    assert all(row["state"].startswith("registered") for row in rows[:1])
    assert "Attempts" in found["report"][0].data


def assert_one_mlflow_run(toy: ServedToy) -> None:
    """MLflow holds one run, finished, with every step's loss once."""
    mlflow = MlflowClient(tracking_uri=toy.tracking_uri)
    experiments = [e.experiment_id for e in mlflow.search_experiments() if e.name != "Default"]
    runs = mlflow.search_runs(experiments)
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = mlflow.get_metric_history(runs[0].info.run_id, "loss")
    assert Counter(metric.step for metric in history) == Counter(range(1, STEPS + 1))


def train_task(flow_run: UUID) -> list[Any]:
    return [run for run in task_runs(flow_run) if run.name.startswith("train")]


def test_killed_trainer_is_retried_by_its_task(toy: ServedToy, uninterrupted_digest: str) -> None:
    """The trainer dies by SIGKILL; the task's retry resumes; the flow run completes."""
    flow_run = toy.trigger()
    toy.kill(toy.wait_for_step(12))

    done = wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)

    assert done.state_name == "Completed"
    assert done.run_count == 1
    assert [run.run_count for run in train_task(flow_run)] == [2]
    assert_one_whole_run(toy, flow_run, uninterrupted_digest, attempts=2)
    resumed = view(toy, flow_run).attempts[1].resumed
    assert resumed is not None
    assert resumed.checkpoint is not None
    assert resumed.checkpoint.startswith("step-00000012") or resumed.checkpoint.startswith(
        "step-00000009"
    )


def test_events_tell_each_commit_and_registration(
    toy: ServedToy, prefect_api: PrefectServer
) -> None:
    """Every checkpoint is an event when committed and when registered, related to its run."""
    flow_run = toy.trigger(epochs=1)
    wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)
    committed = {c.id for c in view(toy, flow_run).checkpoints}
    uid = view(toy, flow_run).run.uid

    def told(what: str) -> set[str]:
        return {
            event["payload"]["checkpoint"]
            for event in events(
                prefect_api, f"ckpt_tasks.checkpoint.{what}", related=f"ckpt_tasks.run.{uid}"
            )
        }

    assert committed
    wait_until(lambda: told("committed") == committed, timeout=20, what="commits are told")
    wait_until(lambda: told("registered") == committed, timeout=20, what="registrations are told")


def test_killed_flow_process_comes_back_under_its_id(
    toy: ServedToy, uninterrupted_digest: str
) -> None:
    """The flow's process dies by SIGKILL: Crashed, rescheduled by the automation, completed.

    A flow run that crashed before it began, here for an unknown hyperparameter, is left alone.
    """
    install_automations()
    never_began = toy.trigger(learning_rate=1.0)
    wait_for_state(never_began, "Crashed", log=toy.runner.log)
    flow_run = toy.trigger()
    trainer = toy.wait_for_step(10)
    toy.kill(toy.flow_process(trainer))
    wait_for_state(flow_run, "Crashed", "AwaitingRetry", log=toy.runner.log)

    done = wait_for_state(flow_run, "Completed", "Failed", log=toy.runner.log)

    assert done.state_name == "Completed"
    assert done.run_count == 2
    assert_one_whole_run(toy, flow_run, uninterrupted_digest, attempts=2)
    assert not [run for run in task_runs(flow_run) if run.state_name == "Running"]
    left = wait_for_state(never_began, "Crashed", log=toy.runner.log, timeout=1)
    assert left.run_count == 0
    assert task_runs(never_began) == []


@pytest.mark.parametrize(
    "toy", [{"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}], indirect=True, ids=["heartbeat"]
)
def test_killed_runner_and_flow_come_back_by_heartbeat(
    toy: ServedToy, uninterrupted_digest: str
) -> None:
    """Nobody is left to report: silence marks it Crashed, a new runner completes it."""
    install_automations(heartbeat_timeout=35)
    flow_run = toy.trigger()
    trainer = toy.wait_for_step(10)
    toy.kill(toy.flow_process(trainer), toy.runner.pid)
    toy.start_runner()

    done = wait_for_state(flow_run, "Completed", "Failed", timeout=150, log=toy.runner.log)

    assert done.state_name == "Completed"
    assert done.run_count == 2
    assert_one_whole_run(toy, flow_run, uninterrupted_digest, attempts=2)


def test_cancelled_flow_run_saves_before_it_stops(toy: ServedToy) -> None:
    """Cancelling stops the trainer with a save at its next boundary, and nothing restarts it."""
    install_automations()
    flow_run = toy.trigger()
    toy.wait_for_step(10)
    toy.cancel(flow_run)

    wait_for_state(flow_run, "Cancelled", log=toy.runner.log)

    newest = view(toy, flow_run).newest
    assert newest is not None
    assert newest.record is not None
    assert newest.record.trigger == "signal"
    assert newest.record.position.step == toy.steps_done()[-1][1]


@pytest.mark.parametrize(
    "toy", [{"TOY_FUNCTION": "crash", "TOY_MLFLOW": ""}], indirect=True, ids=["crash"]
)
def test_training_that_always_fails_spends_its_retries(toy: ServedToy) -> None:
    """A bug in the user's code fails the flow run after the retries, with the report published."""
    flow_run = toy.trigger()

    done = wait_for_state(flow_run, "Completed", "Failed", "Crashed", log=toy.runner.log)

    assert done.state_name == "Failed"
    assert "this training always fails" in (done.state.message if done.state else "")
    assert [run.run_count for run in train_task(flow_run)] == [3]
    assert len(view(toy, flow_run).attempts) == 3
    assert "report" in artifacts(flow_run)
