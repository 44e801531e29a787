"""The extra ``airflow``: Airflow finds the provider, and a DAG is made without torch or MLflow."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import airflow

assert airflow.__version__.startswith("3.")

from airflow.providers_manager import ProvidersManager  # noqa: E402

manager = ProvidersManager()
assert "ckpt-tasks" in manager.providers, sorted(manager.providers)
assert {"ckpt_tasks", "mlflow"} <= set(manager.hooks), sorted(manager.hooks)

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "training.py").write_text(
        textwrap.dedent(
            '''
            import torch  # is not here: the source is read, not imported

            def train(run, lr: float = 0.1, epochs: int = 2):
                """Train.

                Parameters
                ----------
                lr
                    Learning rate.
                """
            '''
        )
    )
    os.chdir(folder)

    from ckpt_tasks.integrations.airflow import resumable_dag

    dag = resumable_dag("training.py:train", dag_id="probe", store=f"{folder}/store")
    assert list(dag.params) == ["lr", "epochs", "resume"]
    assert dag.params.get_param("lr").description == "Learning rate."
    steps = [task.task_id for task in dag.topological_sort()]
    assert steps == ["resolve", "recover", "train", "verify", "report"], steps
    listed = subprocess.run(
        [sys.executable, "-m", "ckpt_tasks", "runs", "--store", folder, "--json"],
        capture_output=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr

loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "mlflow", "prefect"}
assert not loaded, loaded
