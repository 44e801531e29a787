"""Objects are tracked by unique names and get their saved state back by name."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.tracked import TrackedItems

RoundTrip = Callable[[Any], Any]


class Meter:
    """A user's object with a state dict."""

    def __init__(self, total: float = 0.0) -> None:
        self.total = total

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


def tracked(**items: Any) -> TrackedItems:
    tracked = TrackedItems()
    for name, item in items.items():
        tracked.add(name, item)
    return tracked


def test_each_kind_gets_its_state_back(through_storage: RoundTrip) -> None:
    """Modules, optimizers, users' objects and plain values are restored, each in its way."""
    model = nn.Linear(2, 2)
    saved = {"model": model, "meter": Meter(2.5), "state": {"best": 1}, "log": [1, 2]}
    live, meter = nn.Linear(2, 2), Meter()
    state: dict[str, int] = {"old": 0}
    log = [9]
    items = tracked(model=live, meter=meter, state=state, log=log)
    items.restore(through_storage(saved))
    assert torch.equal(live.weight, model.weight)
    assert meter.total == 2.5
    assert state == {"best": 1}
    assert log == [1, 2]
    assert items.names == ["model", "meter", "state", "log"]


@pytest.mark.parametrize(
    ("item", "saved"),
    [
        ({"a": 1}, {"b": 2}),
        (OrderedDict(a=1), OrderedDict(b=2, a=3)),
        (Counter("ab"), Counter("bbc")),
        ([1], [2, 3]),
        (deque([1], maxlen=3), deque([2, 3], maxlen=3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_are_restored_in_place(
    item: Any, saved: Any, through_storage: RoundTrip
) -> None:
    """The object that the training holds is the one that changes."""
    tracked(item=item).restore(through_storage({"item": saved}))
    assert item == saved
    assert list(item) == list(saved)


def test_a_tensor_is_restored_in_place(through_storage: RoundTrip) -> None:
    """A tracked tensor or parameter keeps its memory and takes the saved values."""
    tensor, parameter = torch.zeros(2), nn.Parameter(torch.zeros(2))
    view = tensor[:1]
    values = through_storage({"t": torch.ones(2), "p": nn.Parameter(torch.ones(2))})
    tracked(t=tensor, p=parameter).restore(values)
    assert view.tolist() == [1.0]
    assert parameter.tolist() == [1.0, 1.0]
    assert parameter.requires_grad


@pytest.mark.parametrize(
    ("item", "saved", "says"),
    [
        ({}, [1], "item is a dict, but a list"),
        ([], {"a": 1}, "item is a list, but a dict"),
        (torch.zeros(2), torch.zeros(3), r"float32 \[2\], but torch.float32 \[3\]"),
        (torch.zeros(2), torch.zeros(2).double(), r"but torch.float64 \[2\]"),
        (torch.zeros(2), [0.0], "but list was saved"),
        (Meter(), {"sum": 1}, r"item: Meter.load_state_dict refuses .* KeyError: 'total'"),
    ],
)
def test_state_of_another_kind_is_refused(
    item: Any, saved: Any, says: str, through_storage: RoundTrip
) -> None:
    """State that does not fit the object raises StateError with its name."""
    with pytest.raises(StateError, match=says):
        tracked(item=item).restore(through_storage({"item": saved}))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model", "tracked already"),
        ("ckpt_tasks.rng", "reserved"),
        ("ckpt_tasks", "reserved"),
        ("", "under a name"),
        (3, "under a name"),
    ],
)
def test_bad_names_are_refused(name: Any, says: str) -> None:
    """A name twice, one of the package's own, or none at all raises StateError."""
    items = tracked(model=Meter())
    with pytest.raises(StateError, match=says):
        items.add(name, Meter())
    assert items.names == ["model"]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (3, "builtins.int"),
        ((1, 2), "builtins.tuple"),
        (object(), "builtins.object"),
        (nn.Linear, "is the class Linear"),
        (torch.Generator(), "Generator"),
        ({"x": [{1: lambda: 0}]}, r"item\['x'\]\[0\]\[1\] is a builtins.function"),
        ({"g": torch.Generator()}, r"item\['g'\] is a torch.*Generator"),
        (Meter(object()), r"item\['total'\] is a builtins.object"),  # type: ignore[arg-type]
        (nn.LazyLinear(2), r"item\['weight'\].*lazy module"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_saved_is_refused_when_it_is_tracked(item: Any, says: str) -> None:
    """StateError names key and type, and nothing is tracked."""
    items = TrackedItems()
    with pytest.raises(StateError, match=says):
        items.add("item", item)
    assert not items.names


def test_state_made_later_is_refused_at_capture() -> None:
    """What came in after it was added raises StateError when it is captured."""
    state: dict[str, Any] = {}
    items = tracked(state=state)
    state["late"] = lambda: 0
    with pytest.raises(StateError, match=r"state\['late'\]"):
        items.capture()


def test_the_packages_own_items_are_captured_and_passed_over(through_storage: RoundTrip) -> None:
    """Reserved names are saved beside the tracked ones, and are not restored to any of them."""
    state = {"x": 1}
    items = tracked(state=state)
    captured = items.capture({"ckpt_tasks.counters": {"step": 3}})
    assert list(captured.trees) == ["state", "ckpt_tasks.counters"]
    items.restore(through_storage({"state": {"x": 2}, "ckpt_tasks.counters": {"step": 3}}))
    assert state == {"x": 2}


def test_the_packages_own_values_are_restored_in_place(through_storage: RoundTrip) -> None:
    """Plain values under reserved names follow live modules like tracked ones."""
    model, state = nn.Linear(1, 1), {}  # type: ignore[var-annotated]
    saved = {"model": model, "ckpt_tasks.state": {"live": model.state_dict(), "best": 1}}
    live = nn.Linear(1, 1)
    tracked(model=live).restore(through_storage(saved), own={"ckpt_tasks.state": state})
    assert state["best"] == 1
    assert state["live"]["weight"].data_ptr() == live.weight.data_ptr()


def test_names_that_do_not_match_are_listed_from_both_sides(through_storage: RoundTrip) -> None:
    """StateError shows what was saved and what is tracked, and nothing has changed."""
    state = {"x": 0}
    items = tracked(state=state, model=Meter())
    values = through_storage({"state": {"x": 1}, "net": Meter(), "ckpt_tasks.rng": {}})
    with pytest.raises(StateError) as caught:
        items.restore(values)
    message = str(caught.value)
    assert "holds ['net', 'state'] and the run tracks ['model', 'state']" in message
    assert "without saved state: ['model'], without a tracked object: ['net']" in message
    assert "track(rename={" in message
    assert "fresh=[" in message
    assert state == {"x": 0}


def test_names_can_be_mapped_left_out_and_fresh(through_storage: RoundTrip) -> None:
    """A renamed, a dropped and a new object are told to restore."""
    model, new = Meter(), Meter(7.0)
    items = tracked(model=model, new=new)
    values = through_storage({"net": Meter(2.0), "old": {"x": 1}})
    items.restore(values, rename={"net": "model", "old": None}, fresh=["new"])
    assert model.total == 2.0
    assert new.total == 7.0


@pytest.mark.parametrize(
    ("rename", "fresh", "says"),
    [
        ({"nett": "model"}, [], "neither saved nor tracked: \\['nett'\\]"),
        ({}, ["mode"], "neither saved nor tracked: \\['mode'\\]"),
        ({"net": "model", "old": "model"}, [], "two saved names"),
        ({"net": "other", "old": None}, [], "without a tracked object: \\['other'\\]"),
    ],
)
def test_wrong_mappings_are_refused(
    rename: Any, fresh: Any, says: str, through_storage: RoundTrip
) -> None:
    """A mapping with a wrong name, or of two to one, raises StateError."""
    values = through_storage({"net": Meter(2.0), "old": {"x": 1}})
    with pytest.raises(StateError, match=says):
        tracked(model=Meter()).restore(values, rename=rename, fresh=fresh)


def test_plain_values_share_memory_with_a_module_again(through_storage: RoundTrip) -> None:
    """A live ``state_dict()`` kept in a plain value follows the module after a restore too."""
    model = nn.Sequential(nn.Linear(2, 2))
    saved = through_storage(
        {
            "state": {"live": model.state_dict(), "all": (list(model.parameters()), [1])},
            "model": model,
        }
    )
    live = nn.Sequential(nn.Linear(2, 2))
    state: dict[str, Any] = {}
    tracked(state=state, model=live).restore(saved)
    assert torch.equal(live[0].weight, model[0].weight)
    assert state["all"][0][0] is live[0].weight
    with torch.no_grad():
        live[0].weight.fill_(5.0)
    assert state["live"]["0.weight"].tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert state["all"][1] == [1]


def test_an_untied_copy_stays_a_copy(through_storage: RoundTrip) -> None:
    """A clone of the weights does not follow the module."""
    model = nn.Linear(1, 1, bias=False)
    saved = through_storage({"state": {"best": model.weight.detach().clone()}, "model": model})
    live = nn.Linear(1, 1, bias=False)
    state: dict[str, Any] = {}
    tracked(state=state, model=live).restore(saved)
    before = state["best"].item()
    with torch.no_grad():
        live.weight.add_(1)
    assert state["best"].item() == before


def test_tracking_and_restoring_draw_no_random_numbers(through_storage: RoundTrip) -> None:
    """All three global generators are where they were."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    values = through_storage({"model": model, "optimizer": optimizer, "state": {"a": [1]}})
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    items = tracked(model=model, optimizer=optimizer, state={})
    items.capture()
    items.restore(values)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


def test_tied_modules_stay_tied(through_storage: RoundTrip) -> None:
    """A weight that two tracked modules share is stored once, and both have it afterwards."""

    def build() -> tuple[nn.Module, nn.Module]:
        encoder, decoder = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        decoder.weight = encoder.weight
        return encoder, decoder

    encoder, decoder = build()
    assert len(capture({"encoder": encoder, "decoder": decoder}).tensors) == 1
    values = through_storage({"encoder": encoder, "decoder": decoder})
    new_encoder, new_decoder = build()
    tracked(encoder=new_encoder, decoder=new_decoder).restore(values)
    assert torch.equal(new_encoder.weight, encoder.weight)
    assert new_decoder.weight is new_encoder.weight


def test_which_saved_names_optimizers_take() -> None:
    """Under the name they were saved by, and none that is left out."""
    items, module = TrackedItems(), nn.Linear(2, 2)
    items.add("model", module)
    items.add("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    assert items.optimizers({}) == {"optimizer"}
    assert items.optimizers({"adam": "optimizer", "old": None}) == {"adam"}
