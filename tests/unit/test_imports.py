"""What the bare package and its command line import, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ckpt_tasks

HEAVY = {"torch", "torchdata", "numpy", "mlflow", "prefect", "airflow", "pandas", "s3fs"}

_IMPORT_AND_LIST = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))
"""

_CALL_AND_LIST = """
import json, sys
from ckpt_tasks.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    print(json.dumps([exit.code, sorted({name.partition('.')[0] for name in sys.modules})]))
"""


def _run(code: str, *arguments: str) -> list[str]:
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(answer.stdout.splitlines()[-1])


def test_the_package_imports_nothing_heavy() -> None:
    """`import ckpt_tasks` loads neither torch nor numpy, nor an orchestrator, nor MLflow."""
    assert not HEAVY & set(_run(_IMPORT_AND_LIST, "ckpt_tasks"))


@pytest.mark.parametrize(
    "module",
    [
        "ckpt_tasks.checkpointer.catalog",
        "ckpt_tasks.checkpointer.verify",
        "ckpt_tasks.config",
        "ckpt_tasks.fencing",
        "ckpt_tasks.recovery",
        "ckpt_tasks.registry",
        "ckpt_tasks.schedule",
        "ckpt_tasks.store",
        "ckpt_tasks.tasks",
        "ckpt_tasks.training.entrypoints.entrypoint",
        "ckpt_tasks.training.launch",
    ],
)
def test_what_orchestrators_and_browsers_use_needs_no_torch(module: str) -> None:
    """Everything outside of the trainer's process is importable without the heavy packages."""
    assert not HEAVY & set(_run(_IMPORT_AND_LIST, module))


def test_browsing_loads_no_training_code(tmp_path) -> None:
    """`ckpt-tasks ls` loads nothing heavy: its start-up is what people wait for."""
    code, modules = _run(_CALL_AND_LIST, "ls", "none", "--store", str(tmp_path))
    assert code == 4
    assert not HEAVY & set(modules)


def test_public_names_are_offered_late() -> None:
    """Every public name is listed and can be imported; others raise."""
    assert set(ckpt_tasks.__all__) <= set(dir(ckpt_tasks))
    for name in ckpt_tasks.__all__:
        assert getattr(ckpt_tasks, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        ckpt_tasks.no_such_name  # noqa: B018
