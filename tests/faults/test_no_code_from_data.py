"""Nothing that is read from a store can execute."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
from pathlib import Path

from support.made_runs import MadeRun

import ckpt_tasks
from ckpt_tasks import load_uri, open_uri
from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.local import LocalStore

PACKAGE = Path(ckpt_tasks.__file__).parent
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load")}
BUILTINS = {"eval", "exec", "compile"}
PEERS = PACKAGE / "bench"
"""What saves and loads are measured beside; they read what they have just written."""


def _findings(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module.partition(".")[0]]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in BUILTINS:
                found.append(f"{path.name}:{node.lineno} {called.id}")
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                call = (called.value.id, called.attr)
                if call in CALLS:
                    found.append(f"{path.name}:{node.lineno} {'.'.join(call)}")
        found += [f"{path.name}:{node.lineno} {name}" for name in names if name in EXECUTES]
    return found


def test_nothing_of_the_package_unpickles() -> None:
    """Neither a module that can, nor a loader that does, nor code from text."""
    modules = [path for path in PACKAGE.rglob("*.py") if PEERS not in path.parents]
    assert len(modules) > 200
    assert [finding for path in modules for finding in _findings(path)] == []
    assert [finding for path in PEERS.rglob("*.py") for finding in _findings(path)]


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self._mark), os.O_CREAT | os.O_WRONLY)


def test_a_pickle_in_the_place_of_any_file_does_nothing(tmp_path: Path) -> None:
    """Whatever reads it takes it for damage."""
    root, mark = tmp_path / "store", tmp_path / "executed"
    run = MadeRun(LocalStore(str(root)))
    checkpoint = run.begin().save(10)
    bomb = pickle.dumps(_Bomb(mark))
    os.close(pickle.loads(bomb))  # noqa: S301 - it would go off
    mark.unlink()
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) >= 5
    uri = (root / run.layout.commit(checkpoint)).as_uri()
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(bomb)
        for read in (
            lambda: load_uri(uri, ["model"]),
            lambda: {name: dict(tensors) for name, tensors in open_uri(uri).items()},
            lambda: view_run(run.store, run.name),
            lambda: read_attempts(run.store, RunLayout(run.name)),
            lambda: run.begin(),
        ):
            with contextlib.suppress(CkptTasksError):
                read()
        path.write_bytes(whole)
        assert not mark.exists(), path
