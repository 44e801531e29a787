"""A checkpoint in other forms: equal to the live state, whole, or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.damage import flip
from support.made_ranks import commit_ranks, part_of_rank, plain, sharded, shared
from support.made_runs import HookedStore, MadeRun, State, Tensor, save_request
from support.retained_runs import RetainedRun
from support.sharded_runs import same
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt_tasks import tasks
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StateError,
)
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.blocks import Part, share_of_rows
from ckpt_tasks.format.tree import decode_tree
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks.exporting import ExportRequest, ServedModel
from ckpt_tasks.types import CheckpointId


class Net(nn.Module):
    """A table in blocks of rows and what is tied to it, every layout, dtypes that NumPy lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 32)
        self.head = nn.Linear(32, 20_000, bias=False)
        self.head.weight = self.table.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.half = nn.Linear(5, 3).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
        self.register_buffer("phase", torch.tensor([1 + 2j, -3j], dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 7))
        self.register_buffer("flags", torch.tensor([True, False]))


class Scene:
    """A run whose second checkpoint refers to what the first one has written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(3)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0)
        self.ema = AveragedModel(self.model)
        self.loop: dict[str, Any] = {
            "sparse": torch.eye(4).to_sparse(),
            "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
            "seen": {1: (2, None), "best": float("inf")},
        }
        self.items = TrackedItems(["model.table.weight"])
        for name in ("model", "optimizer", "ema", "loop"):
            self.items.add(name, getattr(self, name))
        self.run = MadeRun(LocalStore(str(root / "store")))
        self.checkpointer = self._checkpointer()
        self.save(1)
        self.step()
        self.save(2)

    def _checkpointer(self) -> Checkpointer:
        run, attempt = self.run, self.run.begin()
        fence = Fence(run.store, run.layout, attempt.number)
        return Checkpointer(
            InlineDrain(JobRunner(run.store, run.layout, fence)),
            run.identity,
            attempt.number,
            attempt.recovered.lineage,
            hyperparameters={},
            environment={},
        )

    def step(self) -> None:
        """Changes a few rows of the table, and the small layers."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        with torch.no_grad():
            self.model.table.weight[:3] += 1

    def save(self, step: int) -> CheckpointId:
        self.newest = self.checkpointer.save(self.items.capture(), save_request(step)).checkpoint
        return self.newest

    def export(self, to: str, output: str, *only: str, **how: Any) -> Path:
        target = self.root / output
        config = StoreConfig(url=str(self.root / "store"))
        request = ExportRequest(only=list(only))
        report = tasks.export(config, "digits", to, str(target), request=request, **how)
        assert (report.checkpoint, report.output) == (str(self.newest), str(target))
        return target

    def files(self, name: str) -> list[Path]:
        """Those that hold what the newest checkpoint has of a tracked name."""
        run = self.run
        index = read_index(run.store, run.layout, run.record(self.newest).indexes[0])
        paths = [run.layout.in_run(file.path) for file in index.files]
        return [self.root / "store" / path for path in paths if f"/{name}.rank" in path]

    def left(self) -> list[str]:
        """What lies beside the store."""
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("export"))
    files = scene.files("model")
    assert any(file.name.endswith(".rows.safetensors") for file in files)
    assert len({file.parent for file in files}) == 2, "of two writes"
    return scene


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    data = tensor.detach().contiguous()
    return tensor.dtype, tensor.shape, data.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(found: dict[str, Any], live: nn.Module) -> None:
    state = live.state_dict()
    assert found.keys() == state.keys()
    assert [key for key in state if bits(found[key]) != bits(state[key])] == []


# -- safetensors ----------------------------------------------------------------------------------


def test_safetensors_hold_the_live_modules_bit_for_bit(scene: Scene) -> None:
    """By default those of modules, as the library opens them and load_state_dict takes them."""
    folder = scene.export("safetensors", "modules")

    assert [path.name for path in sorted(folder.iterdir())] == [
        "ema.safetensors",
        "model.safetensors",
    ]
    found = load_file(folder / "model.safetensors")
    assert_same_tensors(found, scene.model)
    assert_same_tensors(load_file(folder / "ema.safetensors"), scene.ema)
    fresh = Net()
    fresh.load_state_dict(found)
    assert_same_tensors(dict(fresh.state_dict()), scene.model)
    with safe_open(folder / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("tied")) == {"head.weight": "table.weight"}
    assert metadata == {
        "format": "pt",
        "run": "digits",
        "uid": scene.run.identity.uid,
        "checkpoint": str(scene.newest),
        "step": "2",
        "epoch": "0",
        "tracked": "model",
    }


def test_what_is_no_tensor_stands_in_the_json(scene: Scene) -> None:
    """Together with the file, it gives the optimizer's state back."""
    folder = scene.export("safetensors", "optimizer", "optimizer")
    tensors = load_file(folder / "optimizer.safetensors")
    told = json.loads((folder / "optimizer.json").read_bytes())

    def leaf(tag: str, value: Any) -> object:
        assert tag == "tensor"
        return tensors[value]

    state = decode_tree(told["state"], leaf=leaf)

    assert told["checkpoint"] == str(scene.newest)
    del state["param_shapes"]
    assert same(state, scene.optimizer.state_dict())


def test_safetensors_refuse_what_they_cannot_say(scene: Scene) -> None:
    """By name; another form is named."""
    before = scene.left()
    with pytest.raises(StateError, match=r"loop\['sparse'\] is sparse.*--to torch"):
        scene.export("safetensors", "refused", "model", "loop")
    assert scene.left() == before


def test_parts_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    """Cut by rows and by columns, and what another rank has written."""
    run = MadeRun(LocalStore(str(tmp_path / "store")))
    data, shape = bytes(range(256)) * 30, (60, 128)
    bias = Tensor("model", "bias", b"bias")

    def state(rank: int) -> State:
        rows = share_of_rows(shape, rank, 3)
        columns = Part((0, rank * 40), (60, 48 if rank == 2 else 40))
        tree = {
            "rows": no_parameter(sharded(shape, rows, 0)),
            "columns": no_parameter(sharded(shape, columns, 1)),
            "bias": plain(2),
        }
        tensors = [
            part_of_rank("model", "rows", data, shape, rows),
            part_of_rank("model", "columns", data, shape, columns),
            *([bias] if rank == 0 else []),
        ]
        return State({"model": {"$": "state_dict", "v": [tree, {}]}}, tensors)

    commit_ranks(
        run, [state(rank) for rank in range(3)], [[], [shared(2, bias)], [shared(2, bias)]]
    )

    for to, output in (("safetensors", "out"), ("torch", "out.pt")):
        config = StoreConfig(url=str(tmp_path / "store"))
        tasks.export(config, "digits", to, str(tmp_path / output))

    torch_file = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    for found in (load_file(tmp_path / "out" / "model.safetensors"), torch_file):
        assert found["rows"].detach().numpy().tobytes() == data
        assert found["columns"].detach().numpy().tobytes() == data
        assert found["columns"].shape == shape
        assert found["bias"].numpy().tobytes() == b"bias"


def no_parameter(leaf: Any) -> Any:
    """Bytes cannot be trained."""
    facts, local = leaf["v"]
    return {**leaf, "v": [{key: facts[key] for key in ("shape", "offsets")}, local]}


SIZE = 160 * 2**20

EXPORT = """
import json, re, sys
from pathlib import Path
from ckpt_tasks import tasks
from ckpt_tasks.config import StoreConfig

def peak():  # ru_maxrss begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def export(run):
    tasks.export(StoreConfig(url=sys.argv[1]), run, "safetensors", f"{sys.argv[2]}/{run}")

export("small")
before = peak()
export("large")
print(json.dumps([peak() - before, sorted({n.partition(".")[0] for n in sys.modules})]))
"""


def test_export_takes_neither_memory_nor_torch(tmp_path: Path) -> None:
    """A tensor of any size goes through some windows."""
    content = bytes(range(251)) * (SIZE // 251)
    for name, data in (("small", b"small"), ("large", content)):
        tree = {"$": "state_dict", "v": [{"w": plain(0)}, {}]}
        state = State({"model": tree}, [Tensor("model", "w", data)])
        MadeRun(LocalStore(str(tmp_path / "store")), name).begin().save(1, state)
    answer = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "store"), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown, modules = json.loads(answer.stdout)
    assert grown < SIZE / 2
    assert not {"torch", "numpy", "mlflow"} & set(modules)
    written = (tmp_path / "large" / "model.safetensors").read_bytes()
    assert written[-len(content) :] == content


# -- torch ----------------------------------------------------------------------------------------


def test_torch_file_holds_all_that_was_tracked(scene: Scene) -> None:
    """As weights_only opens it: tied, in its layouts, sparse, and for load_state_dict."""
    states = torch.load(scene.export("torch", "all.pt"), weights_only=True)

    assert list(states) == ["model", "optimizer", "ema", "loop"]
    model = states["model"]
    assert_same_tensors(model, scene.model)
    assert model["head.weight"].data_ptr() == model["table.weight"].data_ptr()
    assert model["conv.weight"].stride() == scene.model.conv.weight.stride()
    assert_same_tensors(states["ema"], scene.ema)
    assert same(states["optimizer"], scene.optimizer.state_dict())
    torch.optim.AdamW(Net().parameters()).load_state_dict(states["optimizer"])
    assert torch.equal(states["loop"]["sparse"].to_dense(), torch.eye(4))
    assert bits(states["loop"]["wide"]) == bits(scene.loop["wide"])
    assert states["loop"]["seen"] == scene.loop["seen"]


def test_torch_refuses_what_only_pickle_restores(tmp_path: Path) -> None:
    """Each is named with its type."""
    scene = Scene(tmp_path)
    scene.loop["last"] = deque([1], maxlen=3)
    scene.loop["seen"]["rows"] = numpy.arange(3)
    scene.save(3)
    with pytest.raises(StateError) as caught:
        scene.export("torch", "refused.pt")
    assert "loop['last'], a collections.deque" in str(caught.value)
    assert "loop['seen']['rows'], a numpy.ndarray" in str(caught.value)
    assert scene.left() == ["store"]
    scene.export("torch", "rest.pt", "model", "optimizer")
    assert list(torch.load(scene.root / "rest.pt", weights_only=True)) == ["model", "optimizer"]


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"to": "safetensor"}, ConfigError, "did you mean 'safetensors'"),
        ({"output": "s3://bucket/out"}, ConfigError, "is no path"),
        ({"output": "{root}/none/out"}, ConfigError, "there is no folder"),
        ({"output": "{root}/store"}, ConfigError, "exists; nothing is overwritten"),
        ({"only": ["modle"]}, ConfigError, "nothing tracked as 'modle'; did you mean 'model'"),
        ({"run": "digit"}, CheckpointNotFoundError, "digit"),
        ({"checkpoint": "step-00000009-a1-s9"}, CheckpointNotFoundError, "has no checkpoint"),
        ({"model": ServedModel(entrypoint="net:build")}, ConfigError, "is for --to mlflow-model"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    scene: Scene, how: dict[str, Any], error: type[Exception], match: str
) -> None:
    """Whatever there was stays as it was."""
    before = scene.left()
    request = ExportRequest(only=how.get("only", []), model=how.get("model"))
    with pytest.raises(error, match=match):
        tasks.export(
            StoreConfig(url=str(scene.root / "store")),
            how.get("run", "digits"),
            how.get("to", "safetensors"),
            how.get("output", "{root}/out").format(root=scene.root),
            checkpoint=how.get("checkpoint"),
            request=request,
        )
    assert scene.left() == before


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_damage_is_never_exported(tmp_path: Path, to: str) -> None:
    """A bit of a file, of its header, or of what an earlier write has left; names that are whole
    still are.
    """
    scene = Scene(tmp_path)
    files = scene.files("model")
    for file in files:
        content = file.read_bytes()
        for place in (0.0005, 0.999):
            flip(place)(file)
            with pytest.raises(CorruptCheckpointError):
                scene.export(to, "damaged", "model")
            assert scene.left() == ["store"]
            file.write_bytes(content)
    flip(0.999)(files[0])
    scene.export(to, "other", "ema")


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_a_collection_meanwhile_tears_nothing(tmp_path: Path, to: str) -> None:
    """At any moment: the export is whole, or says what happened and is not there."""
    outcomes: list[str] = []
    while "whole" not in outcomes:
        run = RetainedRun()
        attempt = run.begin()
        older = attempt.save(1, module_state(1))
        attempt.save(2, module_state(2))
        run.expire(latest=1)
        run.aged.age(10_000)
        store = HookedStore(run.store, at_moment(len(outcomes), run.collect))
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        output = folder / "out"
        try:
            tasks.export_from(store, "digits", to, str(output), checkpoint=str(older))
        except CheckpointNotFoundError as error:
            assert older not in run.left()
            assert list(folder.iterdir()) == []
            outcomes.append("meanwhile" if "removed by a collection" in str(error) else "before")
            continue
        if to == "torch":
            found = torch.load(output, weights_only=True)["model"]
        else:
            found = load_file(output / "model.safetensors")
        assert found["body"].numpy().tobytes() == module_state(1).tensors[0].data
        outcomes.append("whole")
    assert {"before", "meanwhile"} <= set(outcomes)
    assert older in run.left(), "it came no more"


def module_state(step: int) -> State:
    body = Tensor("model", "body", bytes([step]) * 9000)
    tree = {"$": "state_dict", "v": [{"body": plain(0)}, {}]}
    return State({"model": tree}, [body])


def at_moment(moment: int, call: Callable[[], object]) -> Callable[[Any, str], None]:
    """Before the operation of that number."""
    counted = 0

    def before(operation: Any, path: str) -> None:
        nonlocal counted
        counted += 1
        if counted == moment + 1:
            call()

    return before
