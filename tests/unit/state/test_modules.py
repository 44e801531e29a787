"""Modules are saved under names that do not depend on wrappers, and loaded strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.staged import nonfinite_of
from torch import nn
from torch.optim import swa_utils

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.modules import load_module

RoundTrip = Callable[[Any], Any]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, which DistributedDataParallel needs."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def compiled_inside() -> nn.Module:
    model = plain()
    model[0] = torch.compile(model[0])
    return model


WRAPPINGS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "compiled": lambda: torch.compile(plain()),
    "data_parallel": lambda: nn.DataParallel(plain()),
    "distributed": lambda: nn.parallel.DistributedDataParallel(plain()),
    "compiled distributed": lambda: torch.compile(nn.parallel.DistributedDataParallel(plain())),
    "distributed compiled": lambda: nn.parallel.DistributedDataParallel(torch.compile(plain())),
    "compiled inside": compiled_inside,
}


def bare(module: Any) -> nn.Module:
    """The module that wrappers wrap."""
    while hasattr(module, "_orig_mod") or hasattr(module, "module"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


@pytest.mark.parametrize("saved_as", WRAPPINGS)
@pytest.mark.parametrize("loaded_as", WRAPPINGS)
def test_any_wrapping_restores_any_other(
    saved_as: str, loaded_as: str, through_storage: RoundTrip
) -> None:
    """A checkpoint of a module, however wrapped, restores it however it is wrapped now."""
    saved, live = WRAPPINGS[saved_as](), WRAPPINGS[loaded_as]()
    with torch.no_grad():
        bare(saved)[1].running_mean.add_(3)
    captured = capture({"model": saved})
    assert list(captured.trees["model"]["v"][0]) == list(plain().state_dict())
    load_module("model", live, through_storage({"model": saved})["model"])
    for a, b in zip(saved.state_dict().values(), live.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_metadata_follows_the_names(through_storage: RoundTrip) -> None:
    """The versions of a wrapped module are those of the same module unwrapped."""
    wrapped = torch.compile(plain())
    saved = through_storage({"model": wrapped})["model"]
    assert dict(saved._metadata) == dict(plain().state_dict()._metadata)


def test_loading_hands_the_saved_version_to_wrapped_modules(through_storage: RoundTrip) -> None:
    """A module that migrates old state by its version sees the version that was saved."""
    seen: list[object] = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *args)

    saved = through_storage({"model": Versioned(1, 1)})["model"]
    load_module("model", torch.compile(nn.Sequential(Versioned(1, 1))[0]), saved)
    load_module("model", Versioned(1, 1), saved)
    assert seen == [7, 7]


def test_the_submodule_of_an_averaged_model_keeps_its_name() -> None:
    """``module.`` is left out only where DataParallel put it."""
    averaged = swa_utils.AveragedModel(torch.compile(plain()))
    names = list(capture({"ema": averaged}).trees["ema"]["v"][0])
    assert names[0] == "n_averaged"
    assert names[1:] == [f"module.{name}" for name in plain().state_dict()]


def test_names_that_look_like_a_wrappers_are_kept() -> None:
    """A user's own ``module`` and ``_orig_mod`` are names like any other."""
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    model._orig_mod = nn.Linear(1, 1)
    assert list(capture({"m": model}).trees["m"]["v"][0]) == list(model.state_dict())


def test_nonfinite_parameters_are_named_without_wrappers() -> None:
    """An unhealthy parameter is reported under its own name."""
    model = torch.compile(plain())
    with torch.no_grad():
        bare(model)[0].bias[0] = float("nan")
    assert nonfinite_of({"model": model}) == ["model.0.bias"]


@pytest.mark.parametrize(
    ("live", "says"),
    [
        (nn.Linear(2, 4), "size mismatch"),
        (nn.Linear(2, 3, bias=False), "bias"),
        (nn.Sequential(nn.Linear(2, 3)), "0.weight"),
        (nn.Linear(2, 3, dtype=torch.bfloat16), "float32.*bfloat16"),
    ],
    ids=["shape", "unexpected", "missing", "dtype"],
)
def test_a_module_that_does_not_fit_is_refused(
    live: nn.Module, says: str, through_storage: RoundTrip
) -> None:
    """Other shapes, names or dtypes raise StateError with the tracked name and the difference."""
    saved = through_storage({"net": nn.Linear(2, 3)})["net"]
    with pytest.raises(StateError, match=says) as caught:
        load_module("net", live, saved)
    assert str(caught.value).startswith("net: ")


def test_state_of_something_else_is_refused() -> None:
    """A plain value saved under a module's name raises StateError."""
    with pytest.raises(StateError, match="net is a module, but a list"):
        load_module("net", nn.Linear(1, 1), [1])


def test_extra_state_is_kept(through_storage: RoundTrip) -> None:
    """What a module adds by ``get_extra_state`` comes back exactly."""

    class Counting(nn.Linear):
        calls: Any = (1, {2: "b"})

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    live = Counting(1, 1)
    saved = through_storage({"model": live})["model"]
    live.calls = None
    load_module("model", live, saved)
    assert live.calls == (1, {2: "b"})
