"""Which images may be read after values were made of their memory: no value is made of nothing."""

from __future__ import annotations

from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sharded_runs import RankSaver, restore

from ckpt_tasks.training.deferred import defer_images


def tensor(position: int, **details: Any) -> dict[str, Any]:
    return {"$": "tensor", "v": {"index": position, **details} if details else position}


@pytest.mark.parametrize(
    ("node", "waits"),
    [
        (tensor(0), True),
        (tensor(0, grad=True, parameter=True), True),
        (tensor(0, stride=[1, 4]), False),
        (tensor(0, dtype="complex128"), False),
        (tensor(0, device="cuda"), False),
        ([tensor(0), {"b": tensor(0, stride=[1, 4])}], False),
        ({"$": "sparse", "v": {"layout": "coo", "values": tensor(0)}}, False),
        ({"$": "dict", "v": [[0, tensor(0)]]}, True),
        ({"$": "set", "v": [tensor(0)]}, False),
        ([tensor(0), {"$": "frozenset", "v": [[tensor(0)]]}], False),
        ({"$": "tensor", "v": "0"}, False),
    ],
)
def test_what_is_looked_into_is_read_at_once(node: Any, waits: bool) -> None:
    """Whatever copies or computes, as for strides, dtypes, devices and sparse tensors."""
    trees = {"model": {"w": node}}
    assert defer_images(trees, [], lambda position: True) == (trees, {0} if waits else set())


def test_names_of_our_own_are_read_at_once() -> None:
    """Nothing places them; nor is one deferred under another name."""
    trees = {"ckpt_tasks.rng": tensor(0), "model": [tensor(0), tensor(1)]}
    assert defer_images(trees, [], lambda position: True)[1] == {1}


def test_only_what_is_worth_it() -> None:
    """As the source of the images says."""
    trees = {"model": [tensor(0), tensor(1)]}
    assert defer_images(trees, [], lambda position: position == 1)[1] == {1}


def test_an_optimizers_state_goes_to_where_its_parameters_are() -> None:
    """The device of what waits is left out, and that of what does not is kept."""
    on_device = [tensor(0, device="cuda", grad=True), tensor(1, device="cuda", stride=[1, 4])]
    trees = {"optimizer": {"state": on_device}}
    found, waiting = defer_images(trees, ["optimizer"], lambda position: True)
    assert waiting == {0}
    assert found == {"optimizer": {"state": [tensor(0, grad=True), on_device[1]]}}


def test_all_of_it_is_there_wherever_it_stands(tmp_path: Path) -> None:
    """In any container, for a rank that has read its share of it, and one that has read none."""

    def large(value: float) -> torch.Tensor:
        return torch.full((3, 1024, 1024), value)

    module: Any = OrderedDict(of=large(6.0))
    module._metadata = {"": {"scale": large(7.0)}}
    saved: dict[str, Any] = {
        "window": deque([large(1.0)], maxlen=3),
        "pairs": [(large(2.0), 7)],
        "loop": {"best": {"of": large(3.0)}},
        "odd": [{large(4.0)}],
        "alone": large(5.0),
        "modules": [module],
    }
    checkpoint = RankSaver(tmp_path, 0, 1, lambda message: [message]).save(saved)
    for rank in (1, 3):
        items: dict[str, Any] = {
            "window": deque(), "pairs": [], "loop": {}, "odd": [], "alone": large(0.0),
            "modules": [],
        }  # fmt: skip
        restore(tmp_path, checkpoint, items, rank, 4)
        found = [
            *items["window"], items["pairs"][0][0], items["loop"]["best"]["of"], *items["odd"][0],
            items["alone"], items["modules"][0]["of"],
            items["modules"][0]._metadata[""]["scale"],
        ]  # fmt: skip
        for number, tensor in enumerate(found, 1):
            assert torch.equal(tensor, large(float(number)))
