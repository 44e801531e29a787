"""With Airflow and without torch: the provider is found, and a DAG trains, fails and resumes.

Its training runs in another interpreter, the one named by ``TRAINING_PYTHON``, which has torch.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import airflow

assert airflow.__version__.startswith("3."), airflow.__version__

from airflow.providers_manager import ProvidersManager  # noqa: E402

manager = ProvidersManager()
assert "ckpt-tasks" in manager.providers, sorted(manager.providers)
assert {"ckpt_tasks", "mlflow"} <= set(manager.hooks), sorted(manager.hooks)

TRAINING = '''
import os
import torch  # is not where Airflow is: the source is read there, not imported

def train(run, lr: float = 0.1, epochs: int = 2):
    """Train.

    Parameters
    ----------
    lr
        Learning rate.
    """
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.ones(3, 1))
    run.track(model=model, loader=loader)
    for epoch in run.epochs(epochs):
        for batch in run.steps(loader):
            model(batch).backward()
        if epoch == 1 and not os.path.exists("failed"):
            open("failed", "w").close()
            raise RuntimeError("once")
'''

DAG_FILE = """
import os
from datetime import timedelta
from ckpt_tasks.integrations.airflow import resumable_dag

dag = resumable_dag(
    "training.py:train",
    dag_id="probe",
    store=os.path.abspath("store"),
    python=os.environ["TRAINING_PYTHON"],
    retries=1,
    retry_delay=timedelta(0),
    dag_schedule=None,
)
assert list(dag.params) == ["lr", "epochs", "resume"]
assert dag.params.get_param("lr").description == "Learning rate."
steps = [task.task_id for task in dag.topological_sort()]
assert steps == ["resolve", "recover", "train", "verify", "report"], steps
"""

RUN = """
import sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag("dags")
assert not bag.import_errors, bag.import_errors
loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "mlflow", "prefect"}
assert not loaded, loaded
run = bag.dags["probe"].test()
states = {ti.task_id: (str(ti.state), ti.try_number) for ti in run.get_task_instances()}
expected = dict.fromkeys(("resolve", "recover", "verify", "report"), ("success", 1))
assert states == {**expected, "train": ("success", 2)}, states
"""

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    Path("training.py").write_text(TRAINING)
    Path("dags").mkdir()
    Path("dags", "probe.py").write_text(DAG_FILE)
    environment = {
        **os.environ,
        "AIRFLOW__CORE__DAGS_FOLDER": str(Path("dags").resolve()),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    for command in (["-m", "airflow", "db", "migrate"], ["-c", textwrap.dedent(RUN)]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "attempt 2 resumed from step-00000003-a1-s1" in done.stdout + done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "ckpt_tasks", "runs", "--store", "store", "--json"],
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    assert "probe-" in listed.stdout
