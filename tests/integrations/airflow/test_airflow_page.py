"""The DAGs that ``deployments/airflow/README.md`` shows, executed as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.dag_home import DagHome

PAGE = Path(__file__).parents[3] / "deployments" / "airflow" / "README.md"

TRAINING = """
import torch

def train(run, epochs: int = 1, note: str = ""):
    run.track(model=torch.nn.Linear(1, 1))
    for _ in run.epochs(epochs):
        run.log(loss=0.1)
    print(f"trained for {epochs} epochs: {note}")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    """The page's DAG file with training code beside it, and its connections."""
    folder = tmp_path_factory.mktemp("page")
    home = DagHome(folder)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (home.dags / "example.py").write_text(example)
    (home.dags / "net.py").write_text(TRAINING)
    place = {"conn_type": "ckpt_tasks", "host": str(folder / "store")}
    mlflow = {"conn_type": "mlflow", "host": f"sqlite:///{folder}/mlflow.db"}
    home.environment.update(
        OMP_NUM_THREADS="1",
        AIRFLOW_CONN_CKPT_TASKS_DEFAULT=json.dumps(place),
        AIRFLOW_CONN_MLFLOW_DEFAULT=json.dumps(mlflow),
    )
    return home.migrate()


def test_dag_of_single_steps(home: DagHome) -> None:
    """Values from a task and a template, the run's name from the train task."""
    done = home.run("nightly")

    assert done.state == "success", done.log
    assert f"trained for 2 epochs: {done.run_id}" in done.log
    assert done.xcom("promote")["alias"] == "candidate"
    assert done.xcom("verify")["checkpoint"] == done.xcom("train")["checkpoint"]
    assert {"run", "attempt", "checkpoint", "position", "message"} <= set(done.xcom("train"))


def test_dag_with_its_function_and_a_sensor(home: DagHome) -> None:
    """The sensor finds what the function written in the DAG file has trained."""
    trained, done = home.run("written-here"), home.run("when-good")

    assert (trained.state, done.state) == ("success", "success"), trained.log + done.log
    found = done.xcom("good")
    assert found["checkpoint"] == trained.xcom("fit")["checkpoint"]
    told = re.search(r"What an asset's event tells.*?load_uri", PAGE.read_text(), re.DOTALL)
    assert told is not None
    assert set(found) <= set(re.findall(r"`(\w+)`", told[0]))
