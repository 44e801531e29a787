"""Nothing that is read from a store can execute."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy
import pytest
import torch
from safetensors.torch import save_file
from support.made_runs import MadeRun
from support.retained_runs import RetainedRun, state_of

import ckpt_tasks
from ckpt_tasks import load_uri, open_uri, tasks
from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.marks import mark as put_mark
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.config import CheckpointConfig, RetentionConfig, StoreConfig
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.heartbeat import HeartbeatObserver
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import MARK_KINDS, RunLayout
from ckpt_tasks.format.records import PromotionRecord, RegistryRunIds, now
from ckpt_tasks.replica import adopt, copy
from ckpt_tasks.retention import collect, plan_run
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.training.registration.backlog import find_backlog
from ckpt_tasks.training.registration.promotions import find_lost, record_promotion
from ckpt_tasks.training.registration.registry_ids import read_ids
from ckpt_tasks.training.registration.tail import write_tail
from ckpt_tasks.training.served import ServedSpec, load_served
from ckpt_tasks.types import CheckpointId, MetricRow

PACKAGE = Path(ckpt_tasks.__file__).parent
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    *(("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load")),
    *(
        ("yaml", "unsafe_load"),
        ("yaml", "full_load"),
        ("pandas", "read_pickle"),
        ("pd", "read_pickle"),
    ),
}
FROM = {("torch", "load"), ("numpy", "load"), ("torch.serialization", "load")}
"""The same under a name of one's own."""
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
            asked = [(node.module, alias.name) for alias in node.names]
            found += [f"{path.name}:{node.lineno} {one}" for one in asked if one in FROM]
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


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a bomb that goes off makes."""
    return tmp_path / "executed"


@pytest.fixture
def bombs(mark: Path) -> dict[str, bytes]:
    """A pickle as it is, and as `torch.load` and `numpy.load` find one; each would go off."""
    bomb = _Bomb(mark)
    plain, array, zipped = pickle.dumps(bomb), io.BytesIO(), io.BytesIO()
    numpy.save(array, numpy.array([bomb], dtype=object), allow_pickle=True)
    torch.save(bomb, zipped)
    whole = {"pickle": plain, "numpy": array.getvalue(), "torch": zipped.getvalue()}
    for load in (
        lambda: pickle.loads(plain),  # noqa: S301
        lambda: numpy.load(io.BytesIO(whole["numpy"]), allow_pickle=True)[0],
        lambda: torch.load(io.BytesIO(whole["torch"]), weights_only=False),
    ):
        os.close(load())
        mark.unlink()
    return whole


def _make_all_files(root: Path) -> tuple[RetainedRun, CheckpointId]:
    """One of every file that a store may have."""
    run = RetainedRun(LocalStore(str(root)))
    attempt = run.begin()
    first, second = (attempt.save(step, state_of(step)) for step in (1, 2))
    run.fail(1, step=3)
    store, layout = run.store, run.layout
    for kind in MARK_KINDS:
        put_mark(
            store, layout, kind, second if kind in ("pins", "verified") else first, why="", by=""
        )
    run.complete(str(second))
    store.put(layout.collected, b"{}")
    ids = RegistryRunIds(
        tracking_uri="", experiment_id="", experiment="", run_id="", registered_model="m"
    )
    store.put(layout.registry_ids("memory"), encode(ids))
    write_tail(store, layout, 1, [MetricRow("loss", 0.5, 3, 1)])
    promotion = PromotionRecord(
        uid=run.identity.uid,
        checkpoint=str(second),
        alias="paper",
        registry="memory",
        registered_model="m",
        model_id="m-1",
        at=now(),
    )
    record_promotion(store, layout, promotion)
    return run, second


def _read_by_all(root: Path, checkpoint: CheckpointId, scratch: Path) -> None:
    """Every reader, of which each may refuse; some change the store."""
    store, name = LocalStore(str(root)), "digits"
    layout, config = RunLayout(name), StoreConfig(url=str(root))
    uri = (root / layout.commit(checkpoint)).as_uri()
    views: list[Callable[[], object]] = [
        lambda: load_uri(uri, ["model"]),
        lambda: {name: dict(tensors) for name, tensors in open_uri(uri).items()},
        lambda: view_run(store, name),
        lambda: verify_checkpoint(store, name, checkpoint),
        lambda: state_digest(store, name, checkpoint),
        lambda: find_backlog(
            store,
            layout,
            run=read_run(store, layout),
            registered=(),
            high_water={},
            tails_after=0.0,
        ),
        lambda: find_lost(store, layout, "memory", {str(checkpoint): None}),
        lambda: read_ids(store, layout, "memory", lambda _: None),
        lambda: HeartbeatObserver(store, layout, 1).is_silent(0.0),
        lambda: tasks.report(config, name),
        lambda: tasks.export(config, name, "safetensors", str(scratch / "safetensors")),
        lambda: tasks.export(config, name, "torch", str(scratch / "torch.pt")),
        lambda: copy(store, LocalStore(str(scratch / "replica")), name),
        lambda: adopt(LocalStore(str(scratch / "replica")), name),
        lambda: plan_run(store, name, RetentionConfig(latest=1, max_bytes=1)),
        lambda: collect(store, name, grace=0.001, by="a test"),
        lambda: tasks.reconcile(CheckpointConfig(store=config), name),
        lambda: MadeRun(store, name).begin(takeover=True),
    ]
    for read in views:
        with contextlib.suppress(CkptTasksError):
            read()


def test_a_bomb_in_the_place_of_any_file_does_nothing(
    bombs: dict[str, bytes], mark: Path, tmp_path: Path
) -> None:
    """Of a store, and of a copy, each kind in turn: whatever reads it takes it for damage."""
    kinds = itertools.cycle(bombs.values())
    run, checkpoint = _make_all_files(tmp_path / "store")
    copy(run.store, LocalStore(str(tmp_path / "replica")), run.name)
    for root in (tmp_path / "store", tmp_path / "replica"):
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        assert len(files) >= (18 if root.name == "store" else 8), files
        for number, file in enumerate(files):
            scratch = tmp_path / f"{root.name}-{number}"
            planted = scratch / "store"
            shutil.copytree(root, planted)
            (planted / file).write_bytes(next(kinds))
            _read_by_all(planted, checkpoint, scratch)
            assert not mark.exists(), file
            shutil.rmtree(scratch)


def test_a_bomb_in_an_exported_model_does_nothing(
    bombs: dict[str, bytes], mark: Path, tmp_path: Path
) -> None:
    """Its code is code; its data is none."""
    code = tmp_path / "net_of_bombs.py"
    code.write_text("import torch\n\ndef build():\n    return torch.nn.Linear(1, 1)\n")
    spec = ServedSpec(entrypoint="net_of_bombs:build", params={}, weights="model.safetensors")
    save_file(torch.nn.Linear(1, 1).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_bytes(msgspec.json.encode(spec))

    def load() -> object:
        told = msgspec.json.decode((tmp_path / "model.json").read_bytes(), type=ServedSpec)
        return load_served(tmp_path, told, tmp_path)

    load()
    for file in (tmp_path / "model.json", tmp_path / "model.safetensors"):
        whole = file.read_bytes()
        for bomb in bombs.values():
            file.write_bytes(bomb)
            with pytest.raises((CkptTasksError, msgspec.DecodeError)):
                load()
            assert not mark.exists()
        file.write_bytes(whole)
