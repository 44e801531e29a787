"""Airflow for tests: a home of this process' own, and DAG runs in processes of their own.

Imported before Airflow is, so that no test reads or writes the home of the person who runs it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SETTINGS = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
}

if "airflow" not in sys.modules:
    _own = tempfile.mkdtemp(prefix="ckpt-tasks-airflow-")
    atexit.register(shutil.rmtree, _own, ignore_errors=True)
    os.environ.update(_SETTINGS, AIRFLOW_HOME=_own)

_RUN = """
import json, logging, os, sys
from pathlib import Path
from airflow.dag_processing.dagbag import DagBag

request = json.loads(Path(sys.argv[1]).read_text())
bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
assert not bag.import_errors, bag.import_errors
run = bag.dags[request["dag"]].test(run_conf=request["conf"])
from airflow.utils.session import create_session
from airflow.models.xcom import XComModel
tasks, xcoms = [], {}
with create_session() as session:
    for ti in run.get_task_instances(session=session):
        tasks.append([ti.task_id, ti.map_index, str(ti.state), ti.try_number])
    for row in session.query(XComModel).filter(XComModel.run_id == run.run_id):
        key = f"{row.task_id}[{row.map_index}].{row.key}"
        xcoms[key] = XComModel.deserialize_value(row)
answer = {"state": str(run.state), "run_id": run.run_id, "tasks": tasks, "xcoms": xcoms}
Path(sys.argv[2]).write_text(json.dumps(answer, default=repr))
"""


class DagRun:
    """What came of one execution of a DAG.

    Parameters
    ----------
    answer
        ``state``, ``run_id``, ``tasks`` and ``xcoms``, as the run's process wrote them.
    log
        Everything that the process printed, the tasks' logs among it.
    """

    def __init__(self, answer: dict[str, Any], log: str) -> None:
        self.state: str = answer["state"]
        self.run_id: str = answer["run_id"]
        self.log = log
        self._tasks = {
            (task, index): (state, tries) for task, index, state, tries in answer["tasks"]
        }
        self.xcoms: dict[str, Any] = answer["xcoms"]

    def state_of(self, task: str, index: int = -1) -> str:
        """The state in which the task instance ended."""
        return self._tasks[task, index][0]

    def tries_of(self, task: str, index: int = -1) -> int:
        """How often it was tried."""
        return self._tasks[task, index][1]

    def xcom(self, task: str, index: int = -1, key: str = "return_value") -> Any:
        """What the task returned or pushed."""
        return self.xcoms[f"{task}[{index}].{key}"]

    def indexes(self, task: str) -> list[int]:
        """Map indexes of a mapped task."""
        return sorted(index for name, index in self._tasks if name == task)


class DagHome:
    """An AIRFLOW_HOME with a database, and a folder of DAGs.

    Parameters
    ----------
    folder
        Empty; holds everything.
    dags
        The folder of DAGs; default: an empty one.
    """

    def __init__(self, folder: Path, dags: Path | None = None) -> None:
        self.folder = folder
        self.dags = dags or folder / "dags"
        self.dags.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
            **_SETTINGS,
            "AIRFLOW_HOME": str(folder / "home"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
        }

    def migrate(self) -> DagHome:
        """Make the database's tables."""
        command = [sys.executable, "-m", "airflow", "db", "migrate"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return self

    def run(self, dag: str, conf: dict[str, Any] | None = None, **environment: str) -> DagRun:
        """Execute a DAG with `dag.test()` in a process of its own, to its end."""
        request, answer = self.folder / "request.json", self.folder / "answer.json"
        request.write_text(json.dumps({"dag": dag, "conf": conf or {}}))
        answer.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(request), str(answer)],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert done.returncode == 0, done.stdout[-8000:]
        return DagRun(json.loads(answer.read_text()), done.stdout)
