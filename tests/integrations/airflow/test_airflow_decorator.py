"""``@task.resumable_training``: training functions written in DAG files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.dag_home import DagHome

# isort: split
from airflow.sdk import DAG, task

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.store import open_store

DAG_FILE = '''
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, task
from ckpt_tasks.config import ScheduleConfig

if True:
    from ckpt_tasks import TrainingRun  # of which only an annotation makes use

HOW = dict(store=STORE, schedule=ScheduleConfig(every_steps=2), retries=1, retry_delay=timedelta(0))

with DAG("decorated", schedule=None):

    @task
    def choose() -> float:
        return 0.25

    @task.resumable_training(python=PYTHON, **HOW)
    def fit(run: TrainingRun, lr: float, trace: str, steps: int = 4, **more: float) -> None:
        """Count, and fail once on the way."""
        from pathlib import Path

        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        loader = StatefulDataLoader(range(steps))
        run.track(model=torch.nn.Linear(1, 1), loader=loader)
        try:
            import airflow
        except ImportError:
            airflow = None
        for _ in run.epochs(1):
            for _ in run.steps(loader):
                with Path(trace).open("a") as file:
                    file.write(f"{run.step + 1} {lr} {more} {airflow is not None}\\n")
                if run.step == 2 and not Path(trace + ".failed").exists():
                    Path(trace + ".failed").touch()
                    raise RuntimeError("once")

    fit(choose(), TRACE, momentum=0.9)

with DAG("each", schedule=None):

    @task.resumable_training(**HOW)
    def several(run, width, trace=TRACE):
        """Say who it is."""
        from pathlib import Path

        import torch

        run.track(model=torch.nn.Linear(1, 1))
        for _ in run.epochs(1):
            with Path(trace).open("a") as file:
                file.write(f"{width}\\n")

    several.expand(width=[8, 16])
'''


@pytest.fixture
def python_without_airflow(tmp_path: Path) -> Path:
    """An interpreter that cannot import Airflow, as a training environment's."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import sys\n\n\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'airflow':\n"
        "            raise ModuleNotFoundError('no airflow here', name=name)\n\n\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{block}" exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    return DagHome(tmp_path_factory.mktemp("decorator")).migrate()


def _write(home: DagHome, tmp_path: Path, python: Path | None) -> Path:
    trace = tmp_path / "trace"
    text = DAG_FILE.replace("STORE", repr(str(tmp_path / "store"))).replace(
        "TRACE", repr(str(trace))
    )
    (home.dags / "decorated.py").write_text(text.replace("PYTHON", repr(python and str(python))))
    return trace


def test_function_of_a_dag_file_trains_elsewhere_and_resumes(
    home: DagHome, tmp_path: Path, python_without_airflow: Path
) -> None:
    """From its source alone, with an upstream task's value, where there is no Airflow."""
    trace = _write(home, tmp_path, python_without_airflow)

    done = home.run("decorated")

    assert done.state == "success", done.log
    assert done.tries_of("fit") == 2
    lines = trace.read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == [1, 2, 3, 3, 4]
    assert {line.split(" ", 1)[1] for line in lines} == {"0.25 {'momentum': 0.9} False"}
    with open_store(str(tmp_path / "store")) as store:
        attempts = view_run(store, done.xcom("fit")["run"]).attempts
    assert [a.claim and a.claim.entrypoint for a in attempts] == ["decorated.fit:fit"] * 2


def test_mapped_function_is_a_training_run_each(home: DagHome, tmp_path: Path) -> None:
    """Named by the DAG run, the task and the index."""
    trace = _write(home, tmp_path, None)

    done = home.run("each")

    assert done.state == "success", done.log
    assert sorted(trace.read_text().split(), key=int) == ["8", "16"]
    names = {done.xcom("several", index)["run"] for index in (0, 1)}
    assert names == {f"each-several-{done.run_id}-{index}" for index in (0, 1)}


def test_function_without_a_run_is_refused_at_the_parse() -> None:
    """Its first parameter is the run, which the trainer gives."""

    @task.resumable_training(store="memory://x")
    def fit() -> None: ...

    with DAG("wrong", schedule=None), pytest.raises(ConfigError, match="first one is the run"):
        fit()


def test_wrong_hyperparameter_is_refused_at_the_parse() -> None:
    """The task is called with the hyperparameters, checked as any call is."""

    @task.resumable_training(store="memory://x")
    def fit(run: object, width: int = 8) -> None: ...

    with DAG("wrong", schedule=None), pytest.raises(TypeError, match="widht"):
        fit(widht=16)
