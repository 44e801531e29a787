"""``ckpt-tasks demo --airflow`` as a newcomer runs it: the proof, a second look, nothing left."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from support.airflow_runs import wait_until
from support.shell import COMMAND

from ckpt_tasks.demo.airflow_api import AirflowApi

pytestmark = pytest.mark.timeout(600)


@dataclasses.dataclass(frozen=True)
class Showing:
    """A demo that has ended."""

    folder: Path
    code: int
    output: str

    def printed_command(self, what: str) -> str:
        """How to look at a part of it, as it was printed."""
        found = re.search(rf" {what}: +(.+)$", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]


@pytest.fixture(scope="module")
def showing(tmp_path_factory: pytest.TempPathFactory) -> Showing:
    folder = tmp_path_factory.mktemp("demo")
    process = _start(f"{COMMAND} demo --airflow", folder)
    code = process.wait()
    return Showing(folder, code, (folder / "output").read_text("utf-8"))


def test_the_proof_holds(showing: Showing) -> None:
    """Killed twice and retried by Airflow, it ends as the training that was never killed."""
    assert showing.code == 0, showing.output
    assert "IDENTICAL, bit for bit." in showing.output


def test_nothing_is_left_of_it(showing: Showing) -> None:
    """Servers, tasks, trainers: none of its processes is there when it has ended."""
    assert _processes_of(showing.folder) == []


def test_pages_that_have_gone_are_not_printed_as_if_they_were_there(showing: Showing) -> None:
    """Without a terminal nothing stays up: the only address says until when it holds."""
    (line,) = (line for line in showing.output.splitlines() if "http" in line)
    assert "until the end of the demo: http://127.0.0.1:" in line


def test_the_printed_command_shows_the_store(showing: Showing) -> None:
    """It works in the same directory, with no environment on the PATH."""
    process = _start(showing.printed_command("Store"), showing.folder)
    assert process.wait() == 0
    assert "step-00000450" in (showing.folder / "output").read_text("utf-8")


def test_the_printed_command_shows_airflow_which_ends_when_that_is_killed(
    showing: Showing,
) -> None:
    """The DAG and its run are there, for this machine only; after SIGKILL nothing is."""
    process = _start(showing.printed_command("Airflow"), showing.folder)
    try:
        api = AirflowApi(_address(process, showing.folder / "output"))
        wait_until(lambda: api.has_dag("train-digits"), timeout=60, what="the DAG is parsed")
        runs = api.call("GET", "dags/train-digits/dagRuns")["dag_runs"]
        assert [run["state"] for run in runs] == ["success"]
        members = _processes_of(showing.folder)
        assert len(members) > 5
        assert _listened_on(members) == {"127.0.0.1"}
    finally:
        process.kill()
        process.wait()
    wait_until(
        lambda: not _processes_of(showing.folder), timeout=30, what="none of its processes is left"
    )


def _start(command: str, folder: Path) -> subprocess.Popen[bytes]:
    """Type a command in `folder`, its output in a file there; nothing of the environment helps."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPT_TASKS_", "MLFLOW_"))}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=folder,
            env={**kept, "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    """Of the Airflow whose page it tells."""

    def told() -> str | None:
        text = output.read_text("utf-8")
        assert process.poll() is None, text
        found = re.search(r"is up: (http://\S+)/dags/train-digits;", text)
        return found[1] if found else None

    return wait_until(told, timeout=300, what="Airflow is up")


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Those that have anything to do with `folder`."""
    return [process for process in psutil.process_iter() if str(folder) in _traits(process)]


def _traits(process: psutil.Process) -> str:
    try:
        return f"{process.cmdline()} {process.cwd()} {process.environ()}"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _listened_on(processes: list[psutil.Process]) -> set[str]:
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
