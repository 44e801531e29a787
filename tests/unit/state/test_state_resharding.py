"""Blocks of a tensor that was saved in parts, whatever the cut then and now."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ckpt_tasks.checkpointer.runs import Target, copy_runs
from ckpt_tasks.checkpointer.stored import Stored, StoredTensor
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import Part, overlap, rest_of, share_of_rows, volume
from ckpt_tasks.format.records import TensorEntry
from ckpt_tasks.format.sharded import SavedPart, ShardedLeaves, ShardedTensor
from ckpt_tasks.state.placing import place_all
from ckpt_tasks.state.resharding import ShardedValue
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.tensors import SAFETENSORS_DTYPES, tensor_from_buffer

_PIECE = 24  # bytes that come at a time: values, and pairs of them, are never cut


def ramp(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape)).to(dtype)


def cut(size: int, pieces: int) -> list[tuple[int, int]]:
    """Offset and length of each of so many pieces, as ``torch.chunk`` makes them; maybe empty."""
    step = -(-size // pieces)
    starts = [min(number * step, size) for number in range(pieces)]
    return [(start, min(step, size - start)) for start in starts]


def blocks_of(shape: Sequence[int], pieces: Sequence[int]) -> list[Part]:
    """A tensor cut into so many pieces along each dimension."""
    cuts = itertools.product(*(cut(size, n) for size, n in zip(shape, pieces, strict=True)))
    return [
        Part(tuple(start for start, _ in block), tuple(length for _, length in block))
        for block in cuts
    ]


def values_at(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    spans = zip(part.offsets, part.sizes, strict=True)
    return tensor[tuple(slice(offset, offset + size) for offset, size in spans)]


def saved_in_parts(
    tensor: torch.Tensor, pieces: Sequence[int], details: dict[str, Any] | None = None
) -> ShardedValue:
    """A tensor cut into so many pieces along each dimension, each saved by a rank of its own.

    Its images come in pieces of a few bytes, as chunks of larger ones do.
    """
    stored: dict[Part, tuple[Stored, TensorEntry]] = {}
    images: list[memoryview] = []
    for rank, part in enumerate(blocks_of(tensor.shape, pieces)):
        local = values_at(tensor, part).contiguous()
        image = torch.view_as_real(local) if details else local
        images.append(memoryview(bytes(image.reshape(-1).view(torch.uint8).tolist())))
        stored[part] = Stored(rank, 0), entry_of(image)

    def read(wanted: Sequence[tuple[ShardedTensor, Part]]) -> list[torch.Tensor]:
        return [read_block(sharded, block) for sharded, block in wanted]

    def read_block(sharded: ShardedTensor, block: Part) -> torch.Tensor:
        places = {saved.part: stored[saved.part] for saved in sharded.parts}
        source = StoredTensor(sharded.name, sharded.shape, places)
        source.check_covers(block)
        memory = memoryview(bytearray(source.size_of(block)))
        for image, runs in source.runs([block], block):
            data = images[image.rank]
            for start in range(0, data.nbytes, _PIECE):
                copy_runs(Target(runs, memory), start, data[start : start + _PIECE])
        return tensor_from_buffer(*source.image(block, memory))

    parts = [SavedPart(part, rank, 0, details or {}) for rank, part in enumerate(stored)]
    if 0 not in tensor.shape:
        parts = [saved for saved in parts if volume(saved.part)]
    shape = tuple(tensor.shape)
    return ShardedValue(ShardedTensor("model.weight", shape, tuple(parts), False, False), read)


def entry_of(image: torch.Tensor) -> TensorEntry:
    return TensorEntry(
        file=0,
        key="weight",
        dtype=SAFETENSORS_DTYPES[image.dtype],
        shape=list(image.shape),
        offset=0,
        size=image.nbytes,
        chunks=[],
    )


DIMENSIONS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 4)), min_size=0, max_size=3
)
"""Of each: its extent, in how many pieces it was cut, and in how many it is now."""


@settings(deadline=None)
@given(DIMENSIONS)
def test_any_cut_into_any_other(dimensions: list[tuple[int, int, int]]) -> None:
    """Cut by some ranks, and differently by others: each gets its own values, and all are all."""
    tensor = ramp([size for size, _, _ in dimensions])
    value = saved_in_parts(tensor, [pieces for _, pieces, _ in dimensions])
    assert torch.equal(value.whole(), tensor)
    for wanted in blocks_of(tensor.shape, [pieces for _, _, pieces in dimensions]):
        assert torch.equal(value.piece(wanted), values_at(tensor, wanted))


@settings(deadline=None)
@given(DIMENSIONS)
def test_overlaps_are_those_that_dcp_reads(dimensions: list[tuple[int, int, int]]) -> None:
    """What of which part makes up a block is what torch.distributed.checkpoint would plan."""
    shape = [size for size, _, _ in dimensions]
    saved = [p for p in blocks_of(shape, [n for _, n, _ in dimensions]) if volume(p)]
    for wanted in blocks_of(shape, [n for _, _, n in dimensions]):
        found = [common for part in saved if (common := overlap(part, wanted)) is not None]
        if not volume(wanted):
            assert found == []
            continue
        metadata = TensorStorageMetadata(
            properties=TensorProperties(), size=torch.Size(shape), chunks=list(map(chunk, saved))
        )
        planned = create_read_items_for_chunk_list("w", metadata, [chunk(wanted)])
        assert sorted(placed(item, wanted) for item in planned) == sorted(found)


def placed(item: Any, wanted: Part) -> Part:
    """Where a planned read lies in the whole tensor."""
    inside = zip(wanted.offsets, item.dest_offsets, strict=True)
    return Part(tuple(offset + own for offset, own in inside), tuple(item.lengths))


def chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))


@given(DIMENSIONS, st.data())
def test_the_rest_of_a_block_is_all_but_what_was_taken(
    dimensions: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Every value once, and none of those that were there already."""
    shape = [size for size, _, _ in dimensions]
    one, other = (
        data.draw(st.sampled_from(blocks_of(shape, [d[number] for d in dimensions])))
        for number in (1, 2)
    )
    seen = torch.zeros(shape, dtype=torch.int)
    for piece in rest_of(one, other):
        values_at(seen, piece).add_(1)
    expected = torch.zeros(shape, dtype=torch.int)
    if volume(one):
        values_at(expected, one).fill_(1)
        values_at(expected, other).fill_(0)
    assert torch.equal(seen, expected)


@given(st.lists(st.integers(0, 20), max_size=2), st.integers(1, 5))
def test_shares_of_rows_are_those_of_torch_chunk(shape: list[int], ranks: int) -> None:
    """As FSDP2 deals them out."""
    tensor = ramp(shape)
    shares = [values_at(tensor, share_of_rows(shape, rank, ranks)) for rank in range(ranks)]
    chunks = list(torch.chunk(tensor, ranks)) if shape else [tensor] * ranks
    for share, expected in itertools.zip_longest(shares, chunks):
        assert torch.equal(share, expected if expected is not None else tensor[:0])


@pytest.mark.parametrize("dtype", [*SAFETENSORS_DTYPES, torch.complex128])
def test_every_dtype(dtype: torch.dtype) -> None:
    """Values are put together bit by bit."""
    tensor = (ramp([6, 4]) % 2).to(dtype)
    details = {"dtype": "complex128"} if dtype is torch.complex128 else None
    value = saved_in_parts(tensor, [3, 1], details)
    assert value.whole().dtype is dtype
    assert torch.equal(value.whole(), tensor)
    assert torch.equal(value.piece(Part((1, 1), (4, 2))), tensor[1:5, 1:3])


def without(value: ShardedValue, *gone: int) -> ShardedValue:
    parts = [part for number, part in enumerate(value.saved.parts) if number not in gone]
    return ShardedValue(value.saved._replace(parts=tuple(parts)), value.read)


def test_a_part_that_is_missing_is_found() -> None:
    """No value is made up: neither of a block that lacks one, nor of all."""
    tensor = ramp([6, 4])
    value = without(saved_in_parts(tensor, [3, 1]), 1)
    assert torch.equal(value.piece(Part((0, 0), (2, 4))), tensor[:2])
    with pytest.raises(CorruptCheckpointError, match="hold 4 of the 8 values"):
        value.piece(Part((1, 0), (2, 4)))
    with pytest.raises(CorruptCheckpointError, match="hold 16 of the 24 values"):
        value.whole()
    with pytest.raises(CorruptCheckpointError, match=r"no part of model\.weight was saved"):
        without(value, 0, 1).whole()


def test_parts_that_do_not_fit_are_found() -> None:
    """Of another shape than their place has, of another dtype than the others."""
    fits = {Part((0, 0), (2, 4)): (Stored(0, 0), entry_of(ramp([2, 4])))}
    for image in (ramp([1, 4]), ramp([2, 4], torch.int64), ramp([2, 4, 2])):
        odd = {Part((2, 0), (2, 4)): (Stored(1, 0), entry_of(image))}
        with pytest.raises(CorruptCheckpointError, match="a part of w is"):
            StoredTensor("w", (4, 4), {**fits, **odd})


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
        ShardedLeaves([{"model": {"w": node}}], lambda rank, position: [4, 2])


def test_a_dict_filled_in_another_order_is_the_same() -> None:
    """Optimizers key their state by number, and ranks may have stepped in different orders."""
    trees = [
        {"opt": {"$": "dict", "v": [[key, {"m": leaf({**FACTS, "offsets": [2 * rank, 0]},
                                                    {"$": "tensor", "v": key})}] for key in keys]}}
        for rank, keys in enumerate(([0, 1], [1, 0]))
    ]  # fmt: skip
    leaves = ShardedLeaves(trees, lambda rank, position: [2, 2])
    numbered, found = leaves.numbered("opt", trees[1]["opt"])
    assert [[(part.rank, part.position) for part in each.parts] for each in found] == [
        [(0, 1), (1, 1)],
        [(0, 0), (1, 0)],
    ]
    first, second = ({"m": {"$": "sharded", "v": number}} for number in (0, 1))
    assert numbered["v"] == [[1, first], [0, second]]


def test_plain_objects_take_whole_tensors() -> None:
    """Wherever they stand; a parameter stays one, and what stands twice is one object."""
    tensor = ramp([6, 4])
    value = saved_in_parts(tensor, [3, 1])
    saved = value.saved._replace(is_parameter=True, requires_grad=True)
    value = ShardedValue(saved, value.read)
    state = {"a": [value, (1, value)], "b": torch.ones(2)}
    first, (one, second) = place_all({"ema": (None, state)}, RestoredValues())["ema"]["a"]
    assert first is second
    assert type(first) is torch.nn.Parameter
    assert first.requires_grad
    assert torch.equal(first, tensor)
    assert one == 1
