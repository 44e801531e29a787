"""Training code beside the DAG file, and values that come from elsewhere in the DAG."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from support.dag_home import DagHome

# isort: split
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow import TrainOperator, VerifyOperator, resumable_dag

SECRET = "hush-hush-secret"  # noqa: S105 - what must not be seen anywhere

TRAINING = """
import torch

from data_beside import STEPS

def train(run, lr: float = 0.1, note: str = ""):
    run.track(model=torch.nn.Linear(1, 1))
    for _ in run.epochs(STEPS):
        pass
    print(f"trained with {lr} {note}")
"""

DAG_FILE = """
from airflow.sdk import DAG, TaskGroup, task
from ckpt_tasks.integrations.airflow import RecoverOperator, TrainOperator, resumable_dag

resumable_dag("net:train", dag_id="module", store=STORE)
resumable_dag("nets/net.py:train", dag_id="file", store=STORE)
resumable_dag("net:train", dag_id="gone", store=STORE, python="/nowhere/python")

with DAG("values", schedule=None):

    @task
    def tune() -> float:
        return 0.25

    with TaskGroup("group"):
        TrainOperator(
            task_id="train",
            entrypoint="net:train",
            store=STORE,
            hyperparameters={"lr": tune(), "note": "{{ run_id }}"},
        ) >> RecoverOperator(
            task_id="recover",
            entrypoint="net:train",
            store=STORE,
            resume="fresh",
            run_name="values-group.train-{{ run_id }}",
        )
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    """A plain folder of DAGs and code, which is not the working directory."""
    folder = tmp_path_factory.mktemp("beside")
    home = DagHome(folder)
    (home.dags / "nets").mkdir()
    for place in (home.dags, home.dags / "nets"):
        (place / "net.py").write_text(TRAINING)
        (place / "data_beside.py").write_text("STEPS = 2")
    (home.dags / "beside.py").write_text(DAG_FILE.replace("STORE", repr(str(folder / "store"))))
    home.environment["OMP_NUM_THREADS"] = "1"
    return home.migrate()


@pytest.mark.parametrize("dag", ["module", "file"])
def test_code_beside_the_dag_file_is_trained(home: DagHome, dag: str) -> None:
    """As a module or as a file, with what it imports from there, wherever Airflow was started."""
    done = home.run(dag, {"lr": 0.5})

    assert done.state == "success", done.log
    assert "trained with 0.5" in done.log


def test_interpreter_that_is_not_there_fails_the_run_but_hides_no_dag(home: DagHome) -> None:
    """Only where it trains must it exist; there its absence is one clear failure."""
    done = home.run("gone")

    resolve = (done.state_of("resolve"), done.tries_of("resolve"))
    assert (done.state, resolve) == ("failed", ("failed", 1))
    assert "cannot run the interpreter '/nowhere/python'" in done.log
    assert done.state_of("train") == "upstream_failed"


def test_hyperparameters_come_from_templates_and_earlier_tasks(home: DagHome) -> None:
    """In a task group, too, whose steps know the train task beside them."""
    done = home.run("values")

    assert done.state == "success", done.log
    assert f"trained with 0.25 {done.run_id}" in done.log
    # `fresh` was the same invocation's, and has been: what was trained is not begun again.
    assert done.xcom("group.recover")["step"] == 0
    assert done.xcom("group.recover")["checkpoint"] == done.xcom("group.train")["checkpoint"]


@pytest.mark.parametrize("conf", [{"lrr": 5}, {"learning_rate": 5}])
def test_misspelt_hyperparameter_of_a_trigger_is_told(home: DagHome, conf: dict[str, Any]) -> None:
    """Nothing is trained with a default instead, and no retry is spent."""
    done = home.run("module", conf)

    assert (done.state, done.tries_of("resolve")) == ("failed", 1)
    assert f"DAG 'module' has no Param '{next(iter(conf))}'" in done.log
    assert done.state_of("train") == "upstream_failed"


def test_template_among_params_is_refused_at_the_parse() -> None:
    """Airflow would pass it on as it is written."""
    with pytest.raises(ConfigError, match=r"hyperparameters=\{'data'"):
        TrainOperator(task_id="train", entrypoint="m:f", params={"data": "{{ run_id }}"})


def test_store_with_credentials_is_refused_at_the_parse() -> None:
    """Airflow shows an operator's rendered arguments to everybody."""
    with pytest.raises(ConfigError, match="has credentials in it") as error:
        VerifyOperator(task_id="v", run_name="r", store=f"s3://key:{SECRET}@bucket/p")
    assert SECRET not in str(error.value)


def test_password_of_a_registry_is_not_in_a_serialised_dag() -> None:
    """Of a mapped task Airflow's database keeps every argument as text."""
    registry = RegistryConfig(tracking_uri=f"https://me:{SECRET}@mlflow.example.org")
    with DAG("mapped", schedule=None) as dag:
        TrainOperator.partial(task_id="train", entrypoint="m:f", registry=registry).expand(
            hyperparameters=[{"lr": 0.1}, {"lr": 0.2}]
        )

    stored = json.dumps(DagSerialization.serialize_dag(dag))

    assert "mlflow.example.org" in stored
    assert SECRET not in stored


def test_every_step_is_retried_and_one_run_is_not_trained_twice_at_once(home: DagHome) -> None:
    """A registry that is away for a minute fails no training that took days."""
    file = home.dags / "net.py"
    registry = RegistryConfig(tracking_uri="sqlite://")
    dag = resumable_dag(
        f"{file}:train", registry=registry, store="memory://x", run_name="one", retries=4
    )

    assert {task.task_id: task.retries for task in dag.tasks} == dict.fromkeys(
        ("resolve", "recover", "train", "verify", "promote", "report"), 4
    )
    assert dag.max_active_runs == 1


def test_dag_is_of_the_file_that_asked_for_it(home: DagHome) -> None:
    """Airflow's pages show that file's source, and `dag.test()` finds what lies beside it."""
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['dag'].fileloc)"
    file = home.folder / "own.py"
    file.write_text(
        "from ckpt_tasks.integrations.airflow import resumable_dag\n"
        "dag = resumable_dag('dags/net.py:train', store='s')\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(
        command, cwd=home.folder, env=home.environment, capture_output=True, text=True
    )

    assert done.stdout.splitlines()[-1:] == [str(file)], done.stderr
    assert not DagBag(str(home.dags)).import_errors
