"""Loading a model by the address of its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.made_runs import MadeRun, save_request
from support.toy_runs import toy_spec
from torch import nn

from ckpt_tasks import tasks
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.state.capture import capture
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks.locate import LocatedCheckpoint
from ckpt_tasks.training.load import load_uri, open_uri


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


# -- open_uri -------------------------------------------------------------------------------------


def test_looking_gives_what_loading_gives(located: LocatedCheckpoint) -> None:
    """The same tensors under the same names, of the optimizer by the keys that lead to them."""
    model = load_uri(located.uri, ["model"])["model"]
    with open_uri(located.uri, digest=located.digest) as checkpoint:
        assert checkpoint.record.id == located.checkpoint
        seen = checkpoint["model"]
        assert list(seen) == list(model)
        assert all(torch.equal(seen[key], model[key]) for key in model)
        moments = [key for key in checkpoint["optimizer"] if key.endswith(".exp_avg")]
        assert checkpoint.stored["optimizer"][moments[0]].dtype == "F32"
        assert "loader" in checkpoint
    assert torch.equal(seen[next(iter(model))], model[next(iter(model))])


def test_changing_what_was_looked_at_changes_no_file(located: LocatedCheckpoint) -> None:
    """A tensor is mapped, and a write to it stays in this process."""
    with open_uri(located.uri) as checkpoint:
        key = next(iter(checkpoint["model"]))
        before = checkpoint["model"][key].clone()
        checkpoint["model"][key].fill_(7)
    with open_uri(located.uri) as again:
        assert torch.equal(again["model"][key], before)


def test_dtypes_and_strides_of_what_is_looked_at(tmp_path: Path) -> None:
    """What safetensors cannot say is said by the tree."""
    values = {
        "complex": torch.tensor([1 + 2j, -3j], dtype=torch.complex128),
        "last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    uri = save_values(tmp_path, values)
    with open_uri(uri) as checkpoint:
        for key, value in values.items():
            seen = checkpoint["values"][key]
            assert (seen.dtype, seen.stride()) == (value.dtype, value.stride())
            assert torch.equal(seen, value)


def test_damage_is_never_shown(tmp_path: Path) -> None:
    """Nor is a checkpoint that is not the one told of."""
    uri = save_values(tmp_path, {"a": torch.zeros(8)})
    (file,) = tmp_path.rglob("values.rank0000.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with open_uri(uri) as checkpoint, pytest.raises(CorruptCheckpointError, match="damaged"):
        checkpoint["values"]["a"]
    with pytest.raises(CorruptCheckpointError, match="not what was told"):
        open_uri(uri, digest="0" * 64)


def test_a_module_is_loaded_all_or_not_at_all(tmp_path: Path) -> None:
    """Straight from the files into its own tensors; with damage anywhere, none is changed."""
    saved = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    uri = save_values(tmp_path, dict(saved.state_dict()))
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    before = {key: value.clone() for key, value in module.state_dict().items()}

    with open_uri(uri) as checkpoint:
        module.load_state_dict(checkpoint["values"])
    assert all(torch.equal(module.state_dict()[k], v) for k, v in saved.state_dict().items())

    module.load_state_dict(before)
    (file,) = tmp_path.rglob("values.rank0000.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with open_uri(uri) as checkpoint, pytest.raises(CorruptCheckpointError):
        module.load_state_dict(checkpoint["values"])
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def save_values(folder: Path, values: dict[str, torch.Tensor]) -> str:
    """Commit them under the name ``values``; returns the checkpoint's address."""
    run = MadeRun(LocalStore(str(folder)))
    captured = capture({"values": values})
    checkpoint = run.begin().checkpointer.save(captured, save_request(10)).checkpoint
    return f"{run.store.url}/{run.layout.commit(checkpoint)}"


def test_a_copy_has_the_same_digest_and_values(located: LocatedCheckpoint, tmp_path: Path) -> None:
    """What was told of the original's record is true of the copy's, in any store."""
    root, there = located.uri.rsplit("/", 3)[0], StoreConfig(url=str(tmp_path / "there"))
    tasks.copy(StoreConfig(url=root), there, "toy", checkpoint=located.checkpoint)
    copied = tasks.locate(there, "toy")
    assert (copied.checkpoint, copied.digest) == (located.checkpoint, located.digest)
    values, expected = (load_uri(uri, ["model"])["model"] for uri in (copied.uri, located.uri))
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[key], expected[key]) for key in values)
