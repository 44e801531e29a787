"""Capture reads state without changing the training; values come back exactly."""

from __future__ import annotations

import collections
import contextlib
import random
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.staged import nonfinite_of
from torch import nn

from ckpt_tasks.errors import CorruptCheckpointError, StateError
from ckpt_tasks.format.safetensors import TensorSpec, build_header, parse_header
from ckpt_tasks.state.capture import capture, restore_values

RoundTrip = Callable[[Any], Any]


def stepped_optimizer(count: int) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(count)]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    optimizer.step()
    return optimizer


def global_generators() -> tuple[Any, ...]:
    words = np.random.get_state()[1]
    return random.getstate(), words.tolist(), torch.get_rng_state().tolist()


def test_capturing_draws_no_random_number_and_steps_nothing() -> None:
    """Generators, parameters and optimizer state are the same before and after."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    generators, weights = global_generators(), model.weight.detach().clone()
    captured = capture({"model": model, "optimizer": optimizer})
    assert global_generators() == generators
    assert torch.equal(model.weight, weights)
    assert not optimizer.state
    assert captured.trees["optimizer"]["state"] == {}


def test_trees_are_readable_json_and_references_are_indices() -> None:
    """A module's tree maps names to indices into the tensors, under their own names."""
    model = nn.Linear(2, 3)
    captured = capture({"note": {"lr": 0.1}, "model": model})
    content, metadata = captured.trees["model"]["v"]
    assert content == {"weight": {"$": "tensor", "v": 0}, "bias": {"$": "tensor", "v": 1}}
    assert metadata == {"$": "odict", "v": [["", {"version": 1}]]}
    assert captured.trees["note"] == {"lr": 0.1}
    assert [(image.item, image.key) for image in captured.tensors] == [
        ("model", "weight"),
        ("model", "bias"),
    ]
    assert list(captured.trees) == ["note", "model"]
    msgspec.json.encode(captured.trees)


def test_shared_tensors_lie_with_the_module() -> None:
    """What a module shares with another item is in the module's file, whatever the order."""
    model = nn.Linear(2, 2)
    captured = capture({"state": {"w": model.weight}, "model": model})
    assert {image.item for image in captured.tensors} == {"model"}


def test_keys_are_unique_within_an_item_and_fit_a_header() -> None:
    """Names that would collide, are reserved, or are no Unicode get a name of their own."""
    value = {
        "a.b": torch.zeros(1),
        "a": {"b": torch.zeros(1)},
        "__metadata__": torch.zeros(1),
        "\ud800": torch.zeros(1),
        3: torch.zeros(1),
    }
    images = capture({"item": value, "tensor": torch.zeros(1)}).tensors
    assert [image.key for image in images] == [
        *("a.b", "a.b#2", "__metadata__#2", "\\ud800", "3", "tensor"),
    ]
    header = build_header([TensorSpec(i.key, i.dtype, i.shape) for i in images], {})
    assert len(parse_header(header)) == len(images)


def test_metadata_of_state_dicts_is_kept(through_storage: RoundTrip) -> None:
    """The versions that modules keep beside their state come back, nested ones too."""
    norm = nn.BatchNorm1d(2)

    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"inner": norm.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            norm.load_state_dict(state["inner"])

    back = through_storage({"model": norm, "holder": Holder()})
    for state in (back["model"], back["holder"]["inner"]):
        assert type(state) is collections.OrderedDict
        assert state._metadata == norm.state_dict()._metadata
        assert state._metadata[""]["version"] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64],
    ids=str,
)
def test_nonfinite_parameters_are_named(bad: float, dtype: torch.dtype) -> None:
    """A parameter that holds NaN or infinity is named; buffers and large values are not."""
    model = nn.Module()
    model.register_parameter("good", nn.Parameter(torch.full((40,), 60000.0).to(dtype)))
    model.register_parameter("bad", nn.Parameter(torch.zeros(40, dtype=dtype)))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, dtype=dtype)))
    model.register_buffer("mask", torch.full((3,), bad))
    assert nonfinite_of({"model": model}) == []
    with torch.no_grad():
        model.bad[7] = bad
    assert nonfinite_of({"model": model, "state": {"x": bad}}) == ["model.bad"]


def test_nonfinite_one_byte_floats_are_named() -> None:
    """Dtypes without kernels of their own are checked too."""
    model = nn.Module()
    values = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    model.register_parameter("weight", nn.Parameter(values, requires_grad=False))
    assert nonfinite_of({"m": model}) == ["m.weight"]


def test_nonfinite_parameters_are_told_from_their_neighbours() -> None:
    """Of many that lie together, and of others dtypes between them, just those that are."""
    model = nn.Module()
    for number in range(50):
        dtype = torch.float64 if number % 10 == 3 else torch.float32
        model.register_parameter(f"p{number}", nn.Parameter(torch.ones(number, dtype=dtype)))
    with torch.no_grad():
        model.p7[3] = float("nan")
        model.p33[32] = float("inf")
    assert nonfinite_of({"model": model}) == ["model.p7", "model.p33"]


def numpy_values() -> dict[str, Any]:
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    return {
        "float64": np.float64("nan"),
        "float32": np.float32(1.5),
        "int8": np.int8(-3),
        "bool": np.bool_(True),
        "complex": np.complex128(1 - 2j),
        "longdouble": np.longdouble("1.1"),
        "array": np.arange(6, dtype="uint32").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "reversed": np.arange(4)[::-1],
        "frozen": frozen,
        "0-dim": np.array(2.5, dtype="float16"),
        "empty": np.zeros((0, 2), dtype=bool),
    }


@pytest.mark.parametrize("name", numpy_values())
def test_numpy_values_come_back(name: str, value_through_storage: RoundTrip) -> None:
    """Scalars and arrays of numbers keep type, dtype, shape and bits."""
    value = numpy_values()[name]
    back = value_through_storage(value)
    assert type(back) is type(value)
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert back.tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "value",
    [np.array(["a"]), np.array([{}]), np.datetime64("2020"), np.zeros(2, dtype=">f4")],
    ids=lambda value: str(value.dtype),
)
def test_other_numpy_values_are_refused(value: Any) -> None:
    """Text, objects, dates and foreign byte order raise StateError with the path."""
    with pytest.raises(StateError, match=r"item\['x'\] is a numpy"):
        capture({"item": {"x": value}})


@pytest.mark.parametrize(
    "value", [torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])]
)
def test_torch_values_come_back(value: Any, value_through_storage: RoundTrip) -> None:
    """Dtypes, devices and sizes are kept, and need no such device."""
    back = value_through_storage({"v": value})["v"]
    assert back == value
    assert type(back) is type(value)


def nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    tags = [
        "tensor",
        "sparse",
        "state_dict",
        "dtype",
        "device",
        "size",
        "numpy",
        "ndarray",
        "odict",
    ]
    return st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries({"$": st.sampled_from(tags), "v": inner}),
        st.dictionaries(
            st.sampled_from(
                [
                    *("index", "dtype", "stride", "device", "grad", "parameter", "layout"),
                    *("size", "indices", "values", "coalesced", "compressed", "plain"),
                ]
            ),
            inner,
            max_size=5,
        ),
    )


hostile = st.recursive(
    st.one_of(
        st.sampled_from([0, 1, 2, -1, True, None, 1.5, "coo", "csr", "complex128", "cuda:3"]),
        st.sampled_from(["float32", "<f8", "|O8", "load", "ones", "", "meta"]),
        st.just({"$": "bytes", "v": "AAAAAAAAAAA="}),
        st.lists(st.integers(-1, 2**64), max_size=3),
    ),
    nodes,
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(hostile)
def test_hostile_trees_raise_nothing_but_corrupt(tree: Any) -> None:
    """Any tree either gives a value or raises CorruptCheckpointError."""
    images = [
        torch.zeros(2, 2),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(4, dtype=torch.uint8),
    ]
    with contextlib.suppress(CorruptCheckpointError):
        restore_values({"item": tree}, images.__getitem__)


def test_each_stored_tensor_is_asked_for_once() -> None:
    """However often a tensor occurs, its bytes are read once."""
    asked: list[int] = []

    def tensor_at(index: int) -> torch.Tensor:
        asked.append(index)
        return torch.zeros(2)

    tensor = torch.zeros(2)
    captured = capture({"a": [tensor, tensor], "b": tensor})
    restore_values(captured.trees, tensor_at)
    assert asked == [0]


def test_python_work_per_tensor_does_not_grow() -> None:
    """Capturing four times the tensors takes about four times the calls, not sixteen."""
    assert 3.5 < calls_of_capture(400) / calls_of_capture(100) < 4.5


def calls_of_capture(count: int) -> int:
    optimizer = stepped_optimizer(count)
    calls = 0

    def count_calls(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count_calls)
    try:
        capture({"optimizer": optimizer})
    finally:
        sys.setprofile(None)
    return calls
