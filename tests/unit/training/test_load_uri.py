"""Loading a model by the address of its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.toy_runs import toy_spec
from torch import nn

from ckpt_tasks import tasks
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.tasks.locate import LocatedCheckpoint
from ckpt_tasks.training.load import load_uri


@pytest.fixture(scope="module")
def located(tmp_path_factory: pytest.TempPathFactory) -> LocatedCheckpoint:
    """The newest checkpoint of a toy training that ran to its end."""
    root = tmp_path_factory.mktemp("load") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        tasks.train(toy_spec(root, params={"epochs": 1}))
    return tasks.locate(StoreConfig(url=str(root)), "toy")


def test_values_are_those_that_were_tracked(located: LocatedCheckpoint) -> None:
    """Only the names asked for: the model's state dict, without the optimizer's."""
    values = load_uri(located.uri, ["model"], digest=located.digest)

    assert set(values) == {"model"}
    assert all(isinstance(value, torch.Tensor) for value in values["model"].values())


def test_name_that_was_not_tracked_is_told(located: LocatedCheckpoint) -> None:
    """With the checkpoint that lacks it."""
    with pytest.raises(CorruptCheckpointError, match=r"lacks.*discriminator"):
        load_uri(located.uri, ["discriminator"])


def test_another_digest_is_refused(located: LocatedCheckpoint) -> None:
    """Whoever was told of a checkpoint gets that one, or an error."""
    with pytest.raises(CorruptCheckpointError, match="not what was told"):
        load_uri(located.uri, ["model"], digest="0" * 64)


@pytest.mark.parametrize("uri", ["", "/nowhere", "s3://bucket/run/commits/x.json", "a/b/c/d.json"])
def test_address_of_something_else_is_refused(uri: str) -> None:
    """The error says what an address looks like."""
    with pytest.raises(ConfigError, match="names no checkpoint"):
        load_uri(uri, ["model"])


def test_checkpoint_that_is_gone_is_told(located: LocatedCheckpoint) -> None:
    """An address may be older than the checkpoint."""
    with pytest.raises(ObjectNotFoundError):
        load_uri(located.uri.replace(located.checkpoint, "step-00009999-a9-s9"), ["model"])


def test_damaged_byte_is_never_handed_out(located: LocatedCheckpoint, tmp_path: Path) -> None:
    """Every byte of what is loaded is verified."""
    root = Path(located.uri.removeprefix("file://")).parents[2]
    copy = tmp_path / "store"
    for path in sorted(root.rglob("*")):
        target = copy / path.relative_to(root)
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    model = max(copy.rglob("model.rank0000.safetensors"), key=lambda path: str(path))
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(bytes(content))

    with pytest.raises(CorruptCheckpointError, match="damaged"):
        load_uri(located.uri.replace(str(root), str(copy)), ["model"])


def test_what_is_loaded_fits_a_module(located: LocatedCheckpoint) -> None:
    """It is a state dict as torch's own modules load it."""
    state = load_uri(located.uri, ["model"])["model"]
    weights = [value for value in state.values() if value.dim() == 2]

    module = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=False)
    module.load_state_dict({"weight": weights[0]})

    assert torch.equal(module.weight, weights[0])


def test_only_what_is_asked_for_is_read(located: LocatedCheckpoint, tmp_path: Path) -> None:
    """A model is loaded where the optimizer's file is gone, and not the other way round."""
    root = Path(located.uri.removeprefix("file://")).parents[2]
    copy = tmp_path / "store"
    shutil.copytree(root, copy)
    for path in copy.rglob("optimizer.rank0000.safetensors"):
        path.unlink()
    uri = located.uri.replace(str(root), str(copy))

    model = load_uri(uri, ["model"])["model"]

    whole = load_uri(located.uri, ["model", "optimizer"])
    assert all(torch.equal(model[name], value) for name, value in whole["model"].items())
    with pytest.raises(CorruptCheckpointError, match=r"optimizer.* is missing"):
        load_uri(uri, ["model", "optimizer"])
