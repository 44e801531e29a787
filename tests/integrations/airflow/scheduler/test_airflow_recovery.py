"""Whatever is killed under a real scheduler, the run resumes and ends as if nothing had been."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.airflow_runs import (
    PACE,
    Airflow,
    DagRun,
    Processes,
    assert_one_mlflow_run,
    assert_one_whole_run,
    kill,
    paused,
    registered_checkpoints,
    steps_done,
    train_in_shell,
    wait_for_step,
    wait_until,
)
from support.claims import move_claim_elsewhere
from support.prefect_runs import ServedToy, wait_for_state
from support.prefect_server import PrefectServer

from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.types import EXIT_DONE

pytestmark = pytest.mark.timeout(600)  # the first one starts Airflow and MLflow


def test_killed_trainer_is_retried_by_its_task(killed: DagRun, whole_digest: str) -> None:
    """The trainer dies by SIGKILL; the task's retry resumes; the DAG run succeeds."""
    assert killed.task()["try_number"] == 2
    assert_one_whole_run(killed, whole_digest, attempts=2)
    first = killed.log(try_number=1)
    assert any("the trainer was killed by SIGKILL" in line for line in first)
    assert any("attempt 2 resumed from step-" in line for line in killed.log(try_number=2))


def test_asset_event_tells_of_the_promoted_checkpoint(killed: DagRun) -> None:
    """What waits for the asset learns where the checkpoint lies and what MLflow calls it."""
    newest = killed.view().newest
    assert newest is not None
    assert newest.record is not None
    told = killed.asset_event("toy")
    assert told["checkpoint"] == newest.id
    assert told["uri"].startswith("file:///")
    assert told["uri"].endswith(f"/commits/{newest.id}.json")
    assert len(told["digest"]) == 64
    assert (told["epoch"], told["step"]) == (3, 32)
    uid = killed.view().run.uid
    assert told["mlflow_run_id"] == assert_one_mlflow_run(killed.airflow.tracking_uri, uid)
    assert told["registered_model"] == "toy"
    assert int(told["version"]) > 0


def test_state_store_points_at_the_newest_checkpoint(killed: DagRun) -> None:
    """Airflow's pages and API show where the run stands, and a killed try takes nothing away."""
    view = killed.view()
    assert view.newest is not None
    assert killed.pointer() == {
        "run": killed.run,
        "uid": view.run.uid,
        "attempt": 2,
        "checkpoint": view.newest.id,
        "step": 32,
    }


def test_new_model_starts_the_dag_that_waits_for_it(killed: DagRun) -> None:
    """A DAG scheduled by the asset runs by itself, and is told which checkpoint it is."""
    followed = killed.followed_by("follow")
    assert followed.state == "success"
    assert followed.xcom("told") == [killed.asset_event("toy")]


def test_clear_of_a_finished_task_finds_it_complete(killed: DagRun) -> None:
    """Nothing is trained again; the task succeeds, says why, and leads to the model's version."""
    steps, version = steps_done(killed.folder), killed.asset_event("toy")["version"]
    killed.clear()
    wait_until(
        lambda: killed.task()["try_number"] == 3 and killed.state == "success",
        timeout=90,
        what="the cleared tasks have succeeded",
    )
    assert any("was complete already" in line for line in killed.log(try_number=3))
    assert f"/models/toy/versions/{version}?" in str(killed.links()["MLflow model version"])
    assert steps_done(killed.folder) == steps
    assert len(killed.view().attempts) == 2


def test_killed_task_process_is_retried(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """The operator's own process dies by SIGKILL; its trainer ends; the retry resumes."""
    run = airflow.trigger(tmp_path)
    trainer = wait_for_step(tmp_path, 12)
    kill(Processes.above(trainer).task)

    assert run.wait_for_state("success", "failed") == "success", run.told()

    assert run.task()["try_number"] == 2
    assert not psutil.pid_exists(trainer)
    assert_one_whole_run(run, whole_digest, attempts=2)


def test_worker_that_is_shut_down_saves_and_the_retry_goes_on(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """SIGTERM to Airflow's supervisor, as of a drained node: nothing is lost but the time."""
    run = airflow.trigger(tmp_path, pace=2 * PACE)
    trainer = wait_for_step(tmp_path, 10)
    os.kill(Processes.above(trainer).supervisor, signal.SIGTERM)

    assert run.wait_for_state("success", "failed") == "success", run.told()

    assert run.task()["try_number"] == 2
    assert_one_whole_run(run, whole_digest, attempts=2)
    first, second = run.view().attempts
    resumed = next(c for c in run.view().checkpoints if c.id == second.resumed.checkpoint)
    assert resumed.record is not None
    assert resumed.record.trigger == "signal"
    done = [step for pid, step in steps_done(tmp_path)]
    assert done == list(range(1, 33)), "no step was done twice"
    assert first.claim is not None


def test_killed_supervisor_and_task_come_back_by_heartbeat(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """Nobody is left to report: the scheduler misses the heartbeat, and the retry resumes."""
    run = airflow.trigger(tmp_path)
    trainer = wait_for_step(tmp_path, 10)
    above = Processes.above(trainer)
    kill(above.supervisor, above.task)

    assert run.wait_for_state("success", "failed") == "success", run.told()

    assert run.task()["try_number"] == 2
    assert not psutil.pid_exists(trainer)
    assert_one_whole_run(run, whole_digest, attempts=2)


def test_sensor_wakes_at_a_new_checkpoint(airflow: Airflow, tmp_path: Path) -> None:
    """It waits in the triggerer, without a worker, until the run has one that is good enough."""
    waiting = airflow.trigger(tmp_path, "wait", run_name="awaited")
    waiting.wait_for_task("deferred", task_id="wait")

    with train_in_shell(airflow, tmp_path, "awaited", pace=4 * PACE) as training:
        assert waiting.wait_for_state("success", "failed") == "success", waiting.log("wait")
        still_training = training.poll() is None
        training.terminate()

    assert still_training
    told = waiting.xcom("wait")
    assert told["step"] > 8
    assert told["metrics"]["loss"] < 100
    (found,) = [
        c
        for c in dataclasses.replace(waiting, run="awaited").view().checkpoints
        if c.id == told["checkpoint"]
    ]
    assert found.standing == "valid"
    assert int(told["version"]) > 0


def test_task_marked_failed_saves_and_goes_on_when_cleared(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """Marking the task failed stops its trainer with a save; a clear goes on from there."""
    run = airflow.trigger(tmp_path, pace=2 * PACE)
    trainer = wait_for_step(tmp_path, 10)
    run.set_state("failed")
    assert run.wait_for_state("failed") == "failed"
    wait_until(lambda: not psutil.pid_exists(trainer), timeout=30, what="the trainer has stopped")

    newest = run.view().newest
    assert newest is not None
    assert newest.record is not None
    assert newest.record.trigger == "signal"
    assert newest.record.position.step == steps_done(tmp_path)[-1][1]
    assert run.task()["try_number"] == 1

    run.clear()
    assert run.wait_for_state("success") == "success"
    assert_one_whole_run(run, whole_digest, attempts=2)
    assert run.view().attempts[1].resumed.checkpoint == newest.id


@pytest.fixture(scope="module")
def prefect_run(
    airflow: Airflow, prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> ServedToy:
    """A flow run, cancelled on its way, that trained into the store and the MLflow of Airflow.

    Its training run has the name ``shared``.
    """
    folder = tmp_path_factory.mktemp("shared")
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url}):
        toy = ServedToy(
            prefect_server,
            folder,
            "shared",
            TOY_RUN_NAME="shared",
            TOY_STORE=airflow.store,
            TOY_MLFLOW=airflow.tracking_uri,
            TOY_EXPERIMENT="toy",
            TOY_STEP_SECONDS=str(PACE),
        )
        with toy.runner:
            flow_run = toy.trigger()
            toy.wait_for_step(8)
            toy.cancel(flow_run)
            wait_for_state(flow_run, "Cancelled", log=toy.runner.log)
    return toy


@pytest.fixture(scope="module")
def taken_over(airflow: Airflow, prefect_run: ServedToy) -> DagRun:
    """A DAG run that has gone on with the training run of a Prefect flow run.

    While it trained, Airflow's buttons led to MLflow, and its log and state store said how far it
    was.
    """
    folder = prefect_run.folder
    run = airflow.trigger(folder, run_name="shared")
    with paused(wait_for_step(folder, 16)):
        wait_until(lambda: all(run.links().values()), timeout=60, what="the links lead somewhere")
        told = wait_until(run.log, timeout=60, what="the log shows something")
        assert any("resumed from step-" in line for line in told), "lines come while it trains"
        assert run.pointer()["step"] >= 8
        assert run.state == "running"
    assert run.wait_for_state("success", "failed") == "success", run.told()
    return run


def test_airflow_goes_on_with_a_run_of_prefect(taken_over: DagRun, whole_digest: str) -> None:
    """Both use one store: the DAG run resumes from the checkpoint that the flow run saved."""
    assert_one_whole_run(taken_over, whole_digest, attempts=2)
    by_prefect, by_airflow = taken_over.view().attempts
    assert by_prefect.claim is not None
    assert by_airflow.claim is not None
    assert "prefect.flow_run_id" in by_prefect.claim.tags
    assert by_airflow.claim.invocation == f"airflow:quick/train/{taken_over.run_id}/-1"
    assert by_airflow.claim.tags["airflow.run_id"] == taken_over.run_id


def test_links_and_asset_lead_to_the_registered_checkpoint(taken_over: DagRun) -> None:
    """The buttons, and what the asset's event says, name the same MLflow run and version."""
    uid = taken_over.view().run.uid
    mlflow_run = assert_one_mlflow_run(taken_over.airflow.tracking_uri, uid)
    told, links = taken_over.asset_event("quick"), taken_over.links()
    assert told["step"] == 32
    assert told["mlflow_run_id"] == mlflow_run
    server = taken_over.airflow.tracking_uri
    assert str(links["MLflow run"]).startswith(server)
    assert f"/runs/{mlflow_run}?" in str(links["MLflow run"])
    assert f"/models/toy/versions/{told['version']}?" in str(links["MLflow model version"])
    assert links["Dashboard"] == "https://dashboard.example.org/runs/shared"


def test_fresh_begins_again_and_says_so(taken_over: DagRun, whole_digest: str) -> None:
    """A new DAG run of a complete training run, with ``fresh``: a new attempt from step 0."""
    airflow, folder = taken_over.airflow, taken_over.folder
    before = len(steps_done(folder))
    again = airflow.trigger(folder, run_name="shared", resume="fresh", pace=0)
    assert again.wait_for_state("success", "failed") == "success", again.told()
    attempt = again.view().attempts[2]
    assert attempt.claim is not None
    assert attempt.claim.resume == "fresh"
    assert attempt.resumed is not None
    assert attempt.resumed.checkpoint is None
    assert "fresh" in attempt.resumed.why
    assert [step for _, step in steps_done(folder)[before:]] == list(range(1, 33))
    assert any("attempt 3 starts from the beginning" in line for line in again.log())
    assert again.digest == whole_digest


def test_task_that_runs_twice_at_once_is_fenced(
    airflow: Airflow, whole_digest: str, tmp_path: Path
) -> None:
    """The later execution of the same task ends the run; the earlier is stale, and not retried.

    Its worker seems to be another host, so that the later one cannot simply end it.
    """
    run = airflow.trigger(tmp_path)
    invocation = f"airflow:quick/train/{run.run_id}/-1"
    with paused(wait_for_step(tmp_path, 8)):
        move_claim_elsewhere(Path(airflow.store), run.run, 1)
        with train_in_shell(airflow, tmp_path, run.run, pace=0, invocation=invocation) as twin:
            assert twin.wait() == EXIT_DONE

    assert run.wait_for_state("success", "failed") == "failed", run.told()
    assert run.task()["try_number"] == 1
    assert any("AirflowFailException: attempt 1" in line and "stale" in line for line in run.log())
    assert_one_whole_run(run, whole_digest, attempts=2)
    view = run.view()
    mlflow_run = assert_one_mlflow_run(airflow.tracking_uri, view.run.uid)
    registered = registered_checkpoints(airflow.tracking_uri, mlflow_run)
    assert registered == Counter(c.id for c in view.checkpoints if c.standing == "valid")


def test_mistakes_fail_once_with_one_line(airflow: Airflow, tmp_path: Path) -> None:
    """What no retry mends spends none, and says in one line what is wrong."""
    run = airflow.trigger(tmp_path, "wrong")
    assert run.wait_for_state("success", "failed") == "failed"
    for task_id, said in (
        ("entrypoint", "no function 'trian'"),
        ("connection", "there is no Airflow connection 'nowhere'"),
        ("param", "learning_rate"),
        ("state", "lock"),
    ):
        task = run.task(task_id)
        assert (task["state"], task["try_number"]) == ("failed", 1)
        lines = run.log_lines(task_id)
        (error,) = [line.text for line in lines if line.is_exception]
        assert error.startswith("AirflowFailException: ")
        assert said in error
        assert len(error.splitlines()) == 1


def test_value_of_the_wrong_type_is_refused_by_the_form(airflow: Airflow, tmp_path: Path) -> None:
    """A hyperparameter that does not fit is refused before anything runs, and named."""
    with pytest.raises(CkptTasksError, match=r"400.*lr"):
        airflow.trigger(tmp_path, "toy", lr="fast")
    with pytest.raises(CkptTasksError, match=r"400.*resume"):
        airflow.trigger(tmp_path, "toy", resume="newest")
