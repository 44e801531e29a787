"""The operators in DAGs of their own, executed by `dag.test()`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.dag_home import DagHome, DagRun

# isort: split
from airflow.sdk.exceptions import AirflowFailException

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.integrations.airflow import PromoteOperator, TrainOperator, VerifyOperator
from ckpt_tasks.store import open_store
from ckpt_tasks.types import CheckpointId

TESTS = Path(__file__).parents[2]
SECRET = "hush-hush-secret"  # noqa: S105 - what must not be seen anywhere

DAG_FILE = """
from datetime import timedelta
from airflow.sdk import DAG, AssetAlias
from ckpt_tasks import load_config
from ckpt_tasks.config import RetentionConfig, ScheduleConfig
from ckpt_tasks.integrations.airflow import TrainOperator, resumable_dag

HOW = dict(
    schedule=ScheduleConfig(every_steps=3, final=True),
    retries=1,
    retry_delay=timedelta(0),
    ckpt_conn_id="place",
)
resumable_dag("support.flaky_training:train", dag_id="flaky", **HOW)
resumable_dag("support.toy_ranks:ddp", dag_id="ranks", nproc=2, **HOW)
resumable_dag(
    "support.flaky_training:train", dag_id="keeping", retention=RetentionConfig(latest=1), **HOW
)

with DAG("mapped", schedule=None, params={"epochs": 1}):
    TrainOperator.partial(
        task_id="train", entrypoint="support.flaky_training:train", outlets=[AssetAlias("models")],
        **HOW,
    ).expand(params=[{"lr": 0.1}, {"lr": 0.2}])

resumable_dag(
    "support.flaky_training:train", dag_id="promoting", registry=load_config().registry, **HOW
)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    """DAGs of the toy; the store and its credentials come from connections."""
    folder = tmp_path_factory.mktemp("operators")
    home = DagHome(folder)
    (home.dags / "toys.py").write_text(DAG_FILE)
    keys = {"conn_type": "aws", "login": "k", "password": SECRET}
    extra = {"storage_conn_id": "keys"}
    place = {"conn_type": "ckpt_tasks", "host": str(folder / "store"), "extra": extra}
    home.environment.update(
        PYTHONPATH=str(TESTS),
        OMP_NUM_THREADS="1",
        AIRFLOW_CONN_KEYS=json.dumps(keys),
        AIRFLOW_CONN_PLACE=json.dumps(place),
    )
    return home.migrate()


def _run(home: DagHome, folder: Path, dag: str, **conf: Any) -> tuple[DagRun, list[int]]:
    """The DAG run, and the steps that the toy did, those before a failure among them."""
    done = home.run(dag, conf, FLAKY_FOLDER=str(folder))
    steps = folder / "steps"
    return done, [int(line) for line in steps.read_text().split()] if steps.exists() else []


def test_retry_resumes_from_the_newest_checkpoint(home: DagHome, tmp_path: Path) -> None:
    """It fails in step 5, after a save at step 3: the retry does steps 4 to 8, and says so.

    No log and no XCom has a secret: of a connection, or of a hyperparameter that is named so.
    """
    (tmp_path / "fail").write_text("5")

    done, steps = _run(home, tmp_path, "flaky", token=SECRET)

    assert done.state == "success", done.log
    assert (done.tries_of("resolve"), done.tries_of("train")) == (1, 2)
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert done.xcom("train")["attempt"] == 2
    assert "attempt 2 resumed from step-00000003-a1-s1" in done.log
    assert "step-00000003-a1-s1" in done.xcom("report")["markdown"]
    assert done.xcom("verify")["checkpoint"] == done.xcom("train")["checkpoint"]
    assert "secret in the environment: True" in done.log
    assert SECRET not in _without_conf(done)
    assert SECRET not in repr(done.xcoms)


def _without_conf(done: DagRun) -> str:
    """The log without the lines in which Airflow itself tells a DAG run's configuration."""
    return "\n".join(line for line in done.log.splitlines() if "conf=" not in line)


@pytest.mark.exhaustive  # under Prefect in `make test`; what is Airflow's of it, others show
def test_killed_rank_is_retried_on_as_many(home: DagHome, tmp_path: Path) -> None:
    """A rank dies in step 5: the retry resumes at step 3, with two ranks again."""
    order = tmp_path / "kill"
    order.write_text("5", encoding="ascii")
    synchronous = {"CKPT_TASKS_SAVE_ASYNCHRONOUS": "false"}  # each save at its own step

    done = home.run("ranks", {"epochs": 1}, TOY_KILL=str(order), **synchronous)

    assert done.state == "success", done.log
    assert done.tries_of("train") == 2
    assert "rank 1: " in done.log
    with open_store(str(home.folder / "store")) as store:
        seen = view_run(store, done.xcom("train")["run"])
    starts = [a.resumed.checkpoint for a in seen.attempts if a.resumed]
    assert starts == [None, "step-00000003-a1-s1"]
    records = [c.record for c in seen.checkpoints if c.record]
    ranks = {(CheckpointId.parse(r.id).attempt, r.world_size) for r in records}
    assert ranks == {(1, 2), (2, 2)}
    assert records[0].position.step == 12


def test_failure_for_good_fails_the_dag_run_and_is_reported(home: DagHome, tmp_path: Path) -> None:
    """Each retry is spent; the report is made all the same, and makes no success of it."""
    (tmp_path / "fail-always").write_text("5")

    done, steps = _run(home, tmp_path, "flaky")

    assert done.state == "failed"
    assert (done.state_of("train"), done.tries_of("train")) == ("failed", 2)
    assert steps == [1, 2, 3, 4, 5, 4, 5]
    assert "told to fail at step 5" in done.log
    assert done.state_of("report") == "success"
    assert "not complete" in done.xcom("report")["markdown"]


def test_mapped_training_is_a_run_for_each_index(home: DagHome, tmp_path: Path) -> None:
    """Its own params over those of the DAG, and its own name; an alias is told of each."""
    done, steps = _run(home, tmp_path, "mapped")

    assert done.state == "success", done.log
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4]
    names = [done.xcom("train", index)["run"] for index in (0, 1)]
    assert names == [f"mapped-train-{done.run_id}-{index}" for index in (0, 1)]


def test_promotion_points_the_alias_at_the_verified_checkpoint(
    home: DagHome, tmp_path: Path
) -> None:
    """With a registry there is the task, and the registry's names are in what it returns."""
    home.environment["CKPT_TASKS_REGISTRY_TRACKING_URI"] = f"sqlite:///{home.folder}/mlflow.db"

    done, _ = _run(home, tmp_path, "promoting", epochs=1)

    assert done.state == "success", done.log
    promoted = done.xcom("promote")
    assert promoted["alias"] == "verified"
    assert promoted["registration"]["checkpoint"] == done.xcom("verify")["checkpoint"]


def test_retention_is_a_task(home: DagHome, tmp_path: Path) -> None:
    """With rules: it tells of each checkpoint why it stays or goes."""
    done, _ = _run(home, tmp_path, "keeping", epochs=1)

    assert done.state == "success", done.log
    verdicts = done.xcom("retain")["plan"]["verdicts"]
    assert [verdict["keep"] for verdict in verdicts] == [True] + [False] * (len(verdicts) - 1)
    assert verdicts[0]["checkpoint"] == done.xcom("verify")["checkpoint"]


def test_missing_connection_fails_once_with_its_name() -> None:
    """No retry is spent on what only a person can mend."""
    operator = VerifyOperator(task_id="verify", run_name="r", ckpt_conn_id="nowhere")

    with pytest.raises(AirflowFailException, match="'nowhere'"):
        operator.execute({})


def test_promotion_without_a_registry_fails_once(tmp_path: Path) -> None:
    """The error says what to give."""
    operator = PromoteOperator(task_id="promote", run_name="r", store=str(tmp_path))

    with pytest.raises(AirflowFailException, match="mlflow_conn_id"):
        operator.execute({})


def test_arguments_are_checked_where_the_dag_is_written() -> None:
    """A typing error in an argument's name is an error of the parse."""
    with pytest.raises(TypeError, match="retires"):
        TrainOperator(task_id="train", entrypoint="m:f", retires=3)


def test_stop_only_says_so() -> None:
    """It is called in a signal's handler, where nothing may block."""
    operator = TrainOperator(task_id="train", entrypoint="m:f")
    assert not operator._stopping

    operator.on_kill()

    assert operator._stopping
