"""Blocks of a tensor that was saved in parts, whatever the cut then and now."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.state.resharding import (
    SavedPart,
    ShardedValue,
    number_sharded,
    place,
    sharded_parts,
)
from ckpt_tasks.state.sharding import Part
from ckpt_tasks.state.tensors import SAFETENSORS_DTYPES


def ramp(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape)).to(dtype)


def cut(size: int, pieces: int) -> list[tuple[int, int]]:
    """Offset and length of each of so many pieces, as ``torch.chunk`` makes them; maybe empty."""
    step = -(-size // pieces)
    starts = [min(number * step, size) for number in range(pieces)]
    return [(start, min(step, size - start)) for start in starts]


def saved_in_parts(
    tensor: torch.Tensor, pieces: Sequence[int], details: dict[str, Any] | None = None
) -> ShardedValue:
    """A tensor cut into so many pieces along each dimension, each saved by a rank of its own."""
    blocks = list(
        itertools.product(*(cut(size, n) for size, n in zip(tensor.shape, pieces, strict=True)))
    )
    images: list[torch.Tensor] = []
    parts: list[SavedPart] = []
    for rank, block in enumerate(blocks):
        local = tensor[tuple(slice(start, start + length) for start, length in block)]
        images.append(torch.view_as_real(local) if details else local)
        part = Part(tuple(start for start, _ in block), tuple(length for _, length in block))
        parts.append(SavedPart(part, rank, 0, details or {}))

    def read(rank: int, position: int, start: int, stop: int) -> torch.Tensor:
        assert position == 0
        image = images[rank]
        return image[start:stop].clone() if image.dim() else image.clone()

    return ShardedValue("model.weight", {"shape": list(tensor.shape)}, parts, read)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 4)), min_size=0, max_size=3
    )
)
def test_any_cut_into_any_other(dimensions: list[tuple[int, int, int]]) -> None:
    """Cut by some ranks, and differently by others: each gets its own values, and all are all."""
    tensor = ramp([size for size, _, _ in dimensions])
    value = saved_in_parts(tensor, [pieces for _, pieces, _ in dimensions])
    assert torch.equal(value.whole(), tensor)
    for block in itertools.product(*(cut(size, pieces) for size, _, pieces in dimensions)):
        wanted = Part(tuple(start for start, _ in block), tuple(length for _, length in block))
        own = tensor[tuple(slice(start, start + length) for start, length in block)]
        assert torch.equal(value.piece(wanted), own)


@pytest.mark.parametrize("dtype", [*SAFETENSORS_DTYPES, torch.complex128])
def test_every_dtype(dtype: torch.dtype) -> None:
    """Values are put together bit by bit."""
    tensor = (ramp([6, 4]) % 2).to(dtype)
    details = {"dtype": "complex128"} if dtype is torch.complex128 else None
    value = saved_in_parts(tensor, [3, 1], details)
    assert value.whole().dtype is dtype
    assert torch.equal(value.whole(), tensor)
    assert torch.equal(value.piece(Part((1, 1), (4, 2))), tensor[1:5, 1:3])


def test_a_part_that_is_missing_is_found() -> None:
    """No value is made up: neither of a block that lacks one, nor of all."""
    tensor = ramp([6, 4])
    value = saved_in_parts(tensor, [3, 1])
    value._parts.pop(1)
    assert torch.equal(value.piece(Part((0, 0), (2, 4))), tensor[:2])
    with pytest.raises(CorruptCheckpointError, match="hold 4 of the 8 values"):
        value.piece(Part((1, 0), (2, 4)))
    with pytest.raises(CorruptCheckpointError, match="hold 16 of the 24 values"):
        value.whole()
    value._parts.clear()
    with pytest.raises(CorruptCheckpointError, match=r"no part of model\.weight was saved"):
        value.whole()


def test_a_part_of_another_shape_than_it_says_is_found() -> None:
    """The image in the store is smaller than the tree tells."""
    part = SavedPart(Part((0, 0), (4, 4)), 0, 0, {})
    value = ShardedValue("w", {"shape": [4, 4]}, [part], lambda *_: ramp([2, 4]))
    with pytest.raises(CorruptCheckpointError, match="has shape"):
        value.whole()


def leaf(facts: Any, local: Any) -> Any:
    return {"$": "sharded", "v": [facts, local]}


LOCAL = {"$": "tensor", "v": 0}
FACTS = {"shape": [4, 2], "offsets": [0, 0]}


@pytest.mark.parametrize(
    "node",
    [
        leaf({**FACTS, "shape": [4]}, LOCAL),
        leaf({**FACTS, "shape": [-4, 2]}, LOCAL),
        leaf({**FACTS, "shape": "42"}, LOCAL),
        leaf({**FACTS, "offsets": [0]}, LOCAL),
        leaf({**FACTS, "offsets": [0, -1]}, LOCAL),
        leaf({**FACTS, "offsets": [0, True]}, LOCAL),
        leaf({"offsets": [0, 0]}, LOCAL),
        leaf({"shape": [4, 2]}, LOCAL),
        leaf(FACTS, {"$": "tensor"}),
        leaf(FACTS, {"$": "tensor", "v": {}}),
        leaf(FACTS, 7),
        leaf(None, LOCAL),
        {"$": "sharded", "v": None},
        {"$": "sharded", "v": [FACTS]},
    ],
)
def test_leaves_are_not_trusted(node: Any) -> None:
    """What no capture writes is damage, whatever it is."""
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        sharded_parts([{"model": {"w": node}}], lambda rank, position: [4, 2])


def test_a_dict_filled_in_another_order_is_the_same() -> None:
    """Optimizers key their state by number, and ranks may have stepped in different orders."""
    trees = [
        {"opt": {"$": "dict", "v": [[key, {"m": leaf({**FACTS, "offsets": [2 * rank, 0]},
                                                    {"$": "tensor", "v": key})}] for key in keys]}}
        for rank, keys in enumerate(([0, 1], [1, 0]))
    ]  # fmt: skip
    parts = sharded_parts(trees, lambda rank, position: [2, 2])
    assert [[(p.rank, p.position) for p in found] for found in parts.values()] == [
        [(0, 0), (1, 0)],
        [(0, 1), (1, 1)],
    ]
    numbered, values = number_sharded("opt", trees[1]["opt"], lambda path, facts: path)  # type: ignore[arg-type, return-value]
    assert values == [*reversed(list(parts))]
    first, second = ({"m": {"$": "sharded", "v": number}} for number in (0, 1))
    assert numbered["v"] == [[1, first], [0, second]]


def test_plain_objects_take_whole_tensors() -> None:
    """Wherever they stand; a parameter stays one, and what stands twice is one object."""
    tensor = ramp([6, 4])
    value = saved_in_parts(tensor, [3, 1])
    value._facts.update(parameter=True, grad=True)
    keep: Callable[..., None] = lambda before, after: pytest.fail("nothing plain was replaced")  # noqa: E731
    placed = place("ema", None, {"a": [value, (1, value)], "b": torch.ones(2)}, keep)
    first, (one, second) = placed["a"]
    assert first is second
    assert type(first) is torch.nn.Parameter
    assert first.requires_grad
    assert torch.equal(first, tensor)
    assert one == 1
