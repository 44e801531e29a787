"""The bare package browses a store and is told what it lacks, without any heavy package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "numpy", "mlflow", "prefect", "airflow", "s3fs")
COMMAND = Path(sys.executable).with_name("ckpt-tasks")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


installed = [name for name in HEAVY if importlib.util.find_spec(name)]
assert not installed, f"the bare environment holds {installed}"

import ckpt_tasks  # noqa: E402 - after the check that nothing else could provide it
from ckpt_tasks.store import open_store  # noqa: E402

assert ckpt_tasks.__version__ == importlib.metadata.version("ckpt-tasks")
store = open_store("store", for_writing=True)
store.create("probe", b"x")
assert store.read("probe") == b"x"

answer = call("runs", "--store", "store")
assert answer.returncode == 0, answer
assert "no runs" in answer.stdout, answer
answer = call("ls", "none", "--store", "store")
assert answer.returncode == 4, answer
assert call("--help").returncode == 0
answer = call("demo")
assert answer.returncode == 2, answer
assert "ckpt-tasks[demo]" in answer.stderr, answer
answer = call("prefect", "install-automations")
assert answer.returncode == 2, answer
assert "ckpt-tasks[prefect]" in answer.stderr, answer
