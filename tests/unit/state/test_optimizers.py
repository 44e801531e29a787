"""Optimizers take their saved state bit by bit, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.optimizers import load_optimizer

RoundTrip = Callable[[Any], Any]


class Recorder(torch.optim.Optimizer):
    """Keeps whatever state a test gives it."""

    def __init__(self, params: Any, values: dict[str, Any] | None = None) -> None:
        super().__init__(params, {"lr": 0.1})
        if values is not None:
            self.state[self.param_groups[0]["params"][0]] = values


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def stepped(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(params, **options)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.1, dtype=torch.float64),
        torch.arange(3, dtype=torch.uint8),
        torch.ones(2, dtype=torch.float32),
        torch.randn(2, dtype=torch.complex64),
        "warm",
        ["a", (1, 2.5), {"x": torch.ones(1, dtype=torch.float64)}],
        (torch.ones(1, dtype=torch.int64), None),
        b"raw",
        None,
        True,
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_keeps_its_type_beside_a_low_precision_parameter(
    value: Any, through_storage: RoundTrip
) -> None:
    """Nothing is cast to the parameter's dtype, and text is not taken apart."""
    saved = Recorder(parameters((2,), dtype=torch.bfloat16), {"value": value})
    live = Recorder(parameters((2,), dtype=torch.bfloat16))
    load_optimizer("opt", live, through_storage({"opt": saved})["opt"])
    (state,) = live.state.values()
    assert same(state["value"], value), (state["value"], value)


def same(a: Any, b: Any) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in b)
    return type(a) is type(b) and bool(a == b)


def test_an_optimizer_that_has_not_stepped_is_saved_as_such(through_storage: RoundTrip) -> None:
    """Restoring it empties one that has stepped."""
    saved = through_storage({"opt": torch.optim.Adam(parameters((2,)))})["opt"]
    live = stepped(parameters((2,)))
    load_optimizer("opt", live, saved)
    assert not live.state
    assert live.param_groups[0]["lr"] == 0.001


def test_restores_into_one_that_has_not_stepped(through_storage: RoundTrip) -> None:
    """State that the live optimizer has not made yet is made from the saved one."""
    source = stepped(parameters((2,), (3, 3)))
    live = torch.optim.Adam(parameters((2,), (3, 3)))
    load_optimizer("opt", live, through_storage({"opt": source})["opt"])
    for a, b in zip(live.state.values(), source.state.values(), strict=True):
        assert same(dict(a), dict(b))
        assert a["step"].dtype is torch.float32
        assert a["step"].ndim == 0


def test_options_of_groups_come_back_with_their_types(through_storage: RoundTrip) -> None:
    """Tuples, None, booleans and a tensor learning rate are what they were."""
    source = stepped(parameters((2,)), lr=torch.tensor(0.25, dtype=torch.float64), betas=(0.5, 0.6))
    live = torch.optim.Adam(parameters((2,)), lr=torch.tensor(1.0, dtype=torch.float64))
    load_optimizer("opt", live, through_storage({"opt": source})["opt"])
    group = live.param_groups[0]
    assert same(group["lr"], torch.tensor(0.25, dtype=torch.float64))
    assert group["betas"] == (0.5, 0.6)
    assert {key: value for key, value in group.items() if key not in ("lr", "params")} == {
        key: value for key, value in source.param_groups[0].items() if key not in ("lr", "params")
    }


def test_a_tensor_shared_with_a_scheduler_stays_shared(through_storage: RoundTrip) -> None:
    """A learning rate that another tracked item holds is one tensor after the restore as well."""
    rate = torch.tensor(0.5)
    saved = through_storage({"opt": torch.optim.SGD(parameters((1,)), lr=rate), "s": {"lr": rate}})
    live = torch.optim.SGD(parameters((1,)), lr=torch.tensor(1.0))
    load_optimizer("opt", live, saved["opt"])
    assert live.param_groups[0]["lr"] is saved["s"]["lr"]


def test_memory_format_of_state_is_kept(through_storage: RoundTrip) -> None:
    """Averages of a channels_last parameter stay channels_last."""
    weights = [nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))]
    source = stepped(weights)
    live = torch.optim.Adam([nn.Parameter(weights[0].detach().clone())])
    load_optimizer("opt", live, through_storage({"opt": source})["opt"])
    (state,) = live.state.values()
    assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("live", "says"),
    [
        (
            lambda: [{"params": parameters((2,))}, {"params": parameters((3,))}],
            "1 parameter groups",
        ),
        (lambda: parameters((2,)), "2 parameters and has 1"),
        (lambda: parameters((3,), (2,)), r"parameter 0 of group 0 .* \[2\] and has \[3\]"),
    ],
    ids=["groups", "parameters", "shapes"],
)
def test_other_parameters_are_refused(
    live: Callable[[], Any], says: str, through_storage: RoundTrip
) -> None:
    """Other groups, counts or shapes raise StateError with the tracked name, and load nothing."""
    saved = through_storage({"opt": stepped(parameters((2,), (3,)))})["opt"]
    optimizer = torch.optim.Adam(live())
    with pytest.raises(StateError, match=says) as caught:
        load_optimizer("opt", optimizer, saved)
    assert str(caught.value).startswith("opt")
    assert not optimizer.state


def test_state_of_something_else_is_refused() -> None:
    """What is no optimizer's state raises StateError."""
    with pytest.raises(StateError, match="opt is an optimizer"):
        load_optimizer("opt", torch.optim.Adam(parameters((2,))), {"weight": 1})


def test_what_the_optimizer_itself_refuses_names_it() -> None:
    """An error inside ``load_state_dict`` becomes StateError with the tracked name."""

    class Picky(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            raise KeyError("nesterov")

    optimizer = Picky(parameters((2,)), lr=0.1)
    with pytest.raises(StateError, match=r"opt: .*nesterov"):
        load_optimizer("opt", optimizer, optimizer.state_dict())
