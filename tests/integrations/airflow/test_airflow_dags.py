"""The shipped DAGs: parsed as Airflow does, and executed."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.dag_home import DagHome, DagRun
from support.made_runs import MadeRun

# isort: split
from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.catalog import list_checkpoints, list_runs
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import open_store

DAGS = Path(__file__).parents[3] / "dags"
HEAVY = {"torch", "torchdata", "mlflow", "prefect", "pandas", "sklearn"}
EMPTY = "from airflow.sdk import DAG\n\nDAG('empty', schedule=None)\n"

_PARSE = """
import json, sys, time
from airflow.dag_processing.dagbag import DagBag
import airflow.sdk
DagBag(sys.argv[1])  # what Airflow itself loads at its first parse
answers = []
for folder in sys.argv[1:]:
    began = time.perf_counter()
    bag = DagBag(folder)
    answers.append({
        "seconds": time.perf_counter() - began,
        "errors": bag.import_errors,
        "dags": {dag.dag_id: [task.task_id for task in dag.tasks] for dag in bag.dags.values()},
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    })
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> DagHome:
    """The shipped DAGs in a plain folder, elsewhere than the repository."""
    folder = tmp_path_factory.mktemp("dags")
    shutil.copytree(DAGS, folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    home = DagHome(folder).migrate()
    home.environment["CKPT_TASKS_STORE_URL"] = str(folder / "store")
    home.environment["OMP_NUM_THREADS"] = "1"
    return home


def _parse(home: DagHome, *folders: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _PARSE, *map(str, folders)],
        env=home.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_dags_are_parsed_without_errors_or_heavy_modules(home: DagHome, tmp_path: Path) -> None:
    """Each is there with its tasks; neither torch nor MLflow nor pandas is loaded for it."""
    (tmp_path / "empty.py").write_text(EMPTY)

    _, shipped = _parse(home, tmp_path, home.dags)

    assert shipped["errors"] == {}
    assert shipped["dags"] == {
        "train-digits": ["resolve", "recover", "train", "verify", "report"],
        "sweep-digits": ["plan", "train", "best"],
        "evaluate-digits": ["choose_checkpoint", "evaluate"],
        "maintain": ["reconcile", "expire", "collect", "report"],
    }
    assert not HEAVY & set(shipped["modules"])


def test_parsing_costs_little_more_than_an_empty_dag(home: DagHome, tmp_path: Path) -> None:
    """The processor parses every file again and again: the second parse of each is cheap.

    The first one of a process also loads this package; even that stays below the time that
    importing Airflow takes there.
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "empty.py").write_text(EMPTY)
    each = []
    for file in sorted(home.dags.glob("*.py")):
        folder = tmp_path / file.stem
        folder.mkdir()
        shutil.copy(file, folder)
        each.append(folder)
    first, *rest = _parse(home, empty, *each, *[empty] * 5, *each)
    later = rest[len(each) :]
    base = statistics.median(answer["seconds"] for answer in later[:5])

    for answer in later[5:]:
        assert answer["seconds"] < 30 * base
    assert sum(answer["seconds"] for answer in rest[: len(each)]) < _importing_airflow(home)
    assert first["errors"] == {}


def _importing_airflow(home: DagHome) -> float:
    code = (
        "import time; t = time.perf_counter(); import airflow.dag_processing.dagbag; "
        "import airflow.sdk; print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=home.environment, capture_output=True, text=True
    )
    return float(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(home: DagHome) -> DagRun:
    """The digits, trained for one epoch by the shipped DAG."""
    done = home.run("train-digits", {"epochs": 1, "width": 8})
    assert done.state == "success", done.log
    return done


def test_train_dag_trains_verifies_and_reports(trained: DagRun) -> None:
    """Without a registry there is nothing to promote in, and no such task."""
    assert "complete at step 45" in trained.xcom("report")["markdown"]
    assert trained.xcom("train")["checkpoint"] == trained.xcom("verify")["checkpoint"]


def test_checkpoint_that_is_not_there_fails_the_dag_run(home: DagHome) -> None:
    """What a trigger asks for and cannot be had spends no retry; one task fails, for one reason."""
    done = home.run("train-digits", {"resume": "step-00000099-a1-s1", "epochs": 1})

    assert done.state == "failed"
    assert (done.state_of("train"), done.tries_of("train")) == ("failed", 1)
    assert (done.state_of("verify"), done.state_of("report")) == ("upstream_failed", "skipped")
    assert "step-00000099-a1-s1" in done.log
    assert "cannot be resumed: there is no such run yet" in done.log


def test_sweep_trains_each_combination_and_ranks_them(home: DagHome) -> None:
    """One training run each, with its own name; the table has the best first."""
    done = home.run("sweep-digits", {"grid": {"lr": [1e-5, 1e-2], "epochs": [1], "width": [8]}})

    assert done.state == "success", done.log
    assert done.indexes("train") == [0, 1]
    best = done.xcom("best")
    assert [trial["params"]["lr"] for trial in best["trials"]] == [1e-2, 1e-5]
    assert best["best"] == best["trials"][0]
    assert best["markdown"].splitlines()[2].startswith("| 1 | 0.01 |")
    runs = {done.xcom("train", index)["run"] for index in (0, 1)}
    assert runs == {f"sweep-digits-{done.run_id}-{index}" for index in (0, 1)}
    stored = {
        summary.name for summary in list_runs(open_store(home.environment["CKPT_TASKS_STORE_URL"]))
    }
    assert runs <= stored


def test_sweep_refuses_a_grid_that_does_not_fit(home: DagHome) -> None:
    """Before anything is trained, with the names that there are."""
    done = home.run("sweep-digits", {"grid": {"learning_rate": [0.1]}})

    assert (done.state, done.state_of("plan"), done.tries_of("plan")) == ("failed", "failed", 1)
    assert "learning_rate" in done.log


def test_maintenance_does_each_step_for_every_run(home: DagHome, tmp_path: Path) -> None:
    """A dry run only tells; then what no rule keeps is gone, and the DAG run fails for the run that
    is damaged, once all others are done.
    """
    environment = {
        "CKPT_TASKS_STORE_URL": str(tmp_path),
        "CKPT_TASKS_RETENTION_LATEST": "1",
        "CKPT_TASKS_RETENTION_GRACE": "0.001s",
    }
    store = open_store(str(tmp_path), for_writing=True)
    run, broken = MadeRun(store, "night"), MadeRun(store, "broken")
    attempt = run.begin()
    saved = [attempt.save(step) for step in (1, 2, 3)]

    told = home.run("maintain", {"dry_run": True}, **environment)
    assert told.state == "success", told.log
    assert (told.xcom("report")["expired"], told.xcom("report")["kept"]) == (2, 3)
    assert list_checkpoints(store, run.layout) == saved

    broken.damage(broken.layout.run_record, position=3)
    done = home.run("maintain", **environment)
    states = [done.state_of(task) for task in ("reconcile", "expire", "collect", "report")]
    assert (done.state, states) == ("failed", ["success"] * 3 + ["failed"]), done.log
    assert done.tries_of("report") == 1
    assert "of 2 runs in" in done.log
    assert "| night | 0 | 0 | 2 | 2 |" in done.log
    assert list_checkpoints(store, run.layout) == [saved[-1]]


def test_evaluation_counts_what_the_model_of_an_address_recognises(home: DagHome) -> None:
    """The accuracy is the one that the training measured at that checkpoint."""
    trained = home.run("train-digits", {"epochs": 1, "width": 8}).xcom("train")
    located = tasks.locate(
        StoreConfig(url=home.environment["CKPT_TASKS_STORE_URL"]), trained["run"]
    )

    done = home.run("evaluate-digits", {"uri": located.uri, "digest": located.digest})

    assert done.state == "success", done.log
    assert done.xcom("evaluate") == pytest.approx(located.metrics["val_accuracy"])
    assert "of the held-out images recognised" in done.log


def test_evaluation_without_event_or_address_says_so(home: DagHome) -> None:
    """Who triggers it by hand learns what it waits for."""
    done = home.run("evaluate-digits")

    assert done.state == "failed"
    assert "no event of train-digits started this run" in done.log


def test_evaluation_uses_the_interpreter_that_it_is_given(home: DagHome) -> None:
    """Airflow's own environment needs no torch: another interpreter may have it."""
    code = "import json, sys; from airflow.dag_processing.dagbag import DagBag\n"
    code += (
        "bag = DagBag(sys.argv[1]); print(bag.dags['evaluate-digits'].get_task('evaluate').python)"
    )
    environment = {**home.environment, "CKPT_TASKS_DAGS_PYTHON": "/opt/training/bin/python"}

    done = subprocess.run(
        [sys.executable, "-c", code, str(home.dags)],
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[-1] == "/opt/training/bin/python"
