"""A checkpoint as an MLflow model: it loads where nothing but the folder is, or is not written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy
import pytest
import torch
import yaml
from support.made_runs import MadeRun, save_request
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, StateError
from ckpt_tasks.state.capture import capture
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks import ExportRequest, ServedModel

NET = """
from torch import nn

from layers import hidden


def build(width: int, features: int, act="relu", depth=1, note=None) -> nn.Module:
    assert act == "123", "a text stays one"
    return nn.Sequential(nn.Linear(features, width), *hidden(width, depth), nn.Linear(width, 2))


def wider(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2), nn.Linear(2, 2))


def broken():
    raise RuntimeError("no such file")


class Other:
    pass
"""
LAYERS = """
from torch import nn


def hidden(width, depth):
    return [nn.Sequential(nn.Dropout(0.5), nn.Linear(width, width)) for _ in range(depth)]
"""
HYPERPARAMETERS = {"width": 5, "act": "123", "lr": 0.1, "features": 6, "api_key": "***"}
EXAMPLE = numpy.linspace(-1, 1, 12, dtype=numpy.float32).reshape(2, 6)


class Scene:
    """A run in a store, and the code of its model in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "nets").mkdir()
        (root / "nets" / "net.py").write_text(NET)
        (root / "nets" / "layers.py").write_text(LAYERS)
        (root / "nets" / "unused.py").write_text("")
        numpy.save(root / "example.npy", EXAMPLE)
        torch.manual_seed(5)
        hidden = [nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 5)) for _ in range(2)]
        self.model = nn.Sequential(nn.Linear(6, 5), *hidden, nn.Linear(5, 2)).eval()
        self.run = MadeRun(LocalStore(str(root / "store")))
        attempt = self.run.begin()
        checkpointer = Checkpointer(
            InlineDrain(self.run.runner(self.run.store, attempt.attempt)),
            self.run.identity,
            attempt.number,
            attempt.recovered.lineage,
            hyperparameters=HYPERPARAMETERS,
            environment={},
        )
        items = {"model": self.model, "ema": AveragedModel(self.model)}
        self.checkpoint = checkpointer.save(capture(items), save_request(7)).id

    @property
    def store(self) -> str:
        return str(self.root / "store")

    def left(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def folder(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, exported by the command and carried away."""
    target = tmp_path_factory.mktemp("elsewhere") / "served"
    command = [sys.executable, "-m", "ckpt_tasks", "export", "digits", "--store", scene.store]
    command += ["--to", "mlflow-model", "--output", str(target), "--only", "model"]
    command += ["--model", "nets/net.py:build", "-p", "depth=2", "--example", "example.npy"]
    command += ["--requirement", "einops>=0.8", "--json"]
    answer = subprocess.run(
        command, cwd=scene.root, check=True, capture_output=True, text=True, timeout=240
    )
    report = json.loads(answer.stdout)
    assert (report["names"], report["checkpoint"]) == (["model"], scene.checkpoint)
    assert scene.left() == ["example.npy", "nets", "store"]
    return target.rename(target.with_name("carried"))


LOAD = """
import json, sys
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
example = numpy.array(json.loads(sys.argv[2]), dtype=numpy.float32)
module = model.get_raw_model()
print(json.dumps([
    model.predict(example).tolist(),
    {name: value.tolist() for name, value in module.state_dict().items()},
    module.training,
]))
"""


def test_model_predicts_in_a_process_that_has_only_the_folder(
    scene: Scene, folder: Path, tmp_path: Path
) -> None:
    """What the live model does, with its weights; built with the run's hyperparameters."""
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), json.dumps(EXAMPLE.tolist())],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    predicted, weights, training = json.loads(answer.stdout.splitlines()[-1])

    with torch.inference_mode():
        expected = scene.model(torch.from_numpy(EXAMPLE))
    assert predicted == expected.tolist()
    assert weights == {name: value.tolist() for name, value in scene.model.state_dict().items()}
    assert training is False


def test_folder_says_what_it_is_and_holds_no_pickle(scene: Scene, folder: Path) -> None:
    """Where it comes from, what it takes and needs, and the code that it imports alone."""
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["metadata"]["ckpt_tasks"]["checkpoint"] == scene.checkpoint
    info = mlflow.models.get_model_info(str(folder))
    assert info.signature.inputs.to_dict()[0]["tensor-spec"] == {
        "dtype": "float32",
        "shape": (-1, 6),
    }
    assert described["model_size_bytes"] > (folder / "data" / "model.safetensors").stat().st_size
    assert json.loads((folder / "data" / "model.json").read_bytes())["params"] == {
        "width": 5,
        "features": 6,
        "act": "123",
        "depth": 2,
    }
    assert sorted(path.name for path in (folder / "code").rglob("*.py")) == ["layers.py", "net.py"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pth", ".pt")]
    needed = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in needed] == [
        "ckpt-tasks",
        "mlflow",
        "numpy",
        "torch",
        "einops>=0.8",
    ]
    assert "+" not in "".join(needed)


@pytest.mark.parametrize(
    ("function", "how", "error", "match"),
    [
        ("wider", {}, StateError, r'(?s)Missing.*"1.weight".*Unexpected.*"3.weight"'),
        ("build", {}, StateError, "Unexpected"),
        ("build", {"params": {"depth": "2", "width": "4"}}, StateError, "size mismatch"),
        ("build", {"params": {"dept": 2}}, ConfigError, "did you mean 'depth'"),
        ("build", {"params": {"width": "x"}}, ConfigError, "is no integer"),
        ("build", {"params": {"api_key": "x"}}, ConfigError, "kept in the model"),
        ("broken", {}, ConfigError, "raised RuntimeError: no such file"),
        ("Other", {}, ConfigError, "returned a Other, not a torch.nn.Module"),
        ("bild", {}, ConfigError, "did you mean 'build'"),
        ("build", {"only": []}, ConfigError, "has model, ema: say which"),
        ("build", {"example": "net.py"}, ConfigError, "no .npy file"),
        (None, {}, ConfigError, "needs what builds the module: --model"),
    ],
)
def test_model_that_would_not_load_is_not_written(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    function: str | None,
    how: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    """The message says what is wrong, by name; nothing is left."""
    monkeypatch.chdir(scene.root / "nets")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = scene.left()
    model = None
    if function is not None:
        model = ServedModel(
            entrypoint=f"net.py:{function}",
            params=how.get("params", {}),
            example=how.get("example"),
        )
    request = ExportRequest(only=how.get("only", ["model"]), model=model)
    with pytest.raises(error, match=match):
        tasks.export(
            StoreConfig(url=scene.store),
            "digits",
            "mlflow-model",
            str(scene.root / "out"),
            request=request,
        )
    assert scene.left() == before


def test_two_models_whose_code_has_one_name_are_not_mixed_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second would be built by the code of the first."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    other = type(sys)("net")
    other.__file__ = "/elsewhere/net.py"
    other.build = lambda **params: nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "net", other)
    with pytest.raises(ConfigError, match=r"'net' of this process is /elsewhere/net\.py"):
        mlflow.pyfunc.load_model(str(folder))
