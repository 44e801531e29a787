"""Bytes of one block that lie in another's memory, copied as they come in pieces."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_tasks.checkpointer.runs import Target, copy_runs, pieces_with
from ckpt_tasks.format.blocks import Part, overlap, runs_between, split, volume


def parts_of(shape: tuple[int, ...]) -> st.SearchStrategy[Part]:
    """Blocks of a tensor, none empty."""
    spans = [
        st.integers(0, size - 1).flatmap(
            lambda start, size=size: st.tuples(st.just(start), st.integers(1, size - start))
        )
        for size in shape
    ]
    return st.tuples(*spans).map(
        lambda found: Part(tuple(start for start, _ in found), tuple(n for _, n in found))
    )


SHAPES = st.one_of(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.tuples(st.integers(50, 300), st.integers(1, 12)),
    st.tuples(st.integers(1, 3), st.integers(20, 60), st.integers(1, 5)),
)
CASES = SHAPES.flatmap(lambda shape: st.tuples(parts_of(shape), parts_of(shape)))
NARROW = (Part((0, 0), (300, 5)), Part((10, 1), (280, 2)))


@given(CASES, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 700))
@example(NARROW, 4, 333)
@example(NARROW, 16, 100_000)
def test_every_byte_to_its_place(blocks: tuple[Part, Part], unit: int, piece: int) -> None:
    """And no other is touched, nor any piece asked for that holds none of them."""
    source, target = blocks
    common = overlap(source, target)
    if common is None:
        return
    held = {index: n for n, index in enumerate(indexes(source))}
    data = bytes(n % 251 for n in range(len(held) * unit))
    expected = bytearray(b"\xff" * len(indexes(target)) * unit)
    needed = set()
    inside = set(indexes(common))
    for n, index in enumerate(indexes(target)):
        if index in inside:
            start = held[index] * unit
            expected[n * unit : (n + 1) * unit] = data[start : start + unit]
            needed |= {at // piece for at in range(start, start + unit)}

    runs = runs_between(common, source, target, unit)
    memory = bytearray(b"\xff" * len(expected))
    numbers = set(pieces_with(runs, piece))
    for number in numbers:
        start = number * piece
        copy_runs(Target(runs, memoryview(memory)), start, memoryview(data)[start : start + piece])

    assert numbers >= needed
    assert memory == expected
    if piece >= unit:
        assert numbers == needed


def indexes(part: Part) -> list[tuple[int, ...]]:
    """Of all elements of a block, row-major."""
    spans = [range(first, first + n) for first, n in zip(*part[:2], strict=True)]
    return list(itertools.product(*spans))


@given(SHAPES.flatmap(parts_of), st.integers(1, 400))
def test_blocks_of_a_split_lie_one_behind_the_other(part: Part, most: int) -> None:
    """None is too large, and one after the other they are the whole."""
    behind = 0
    for piece in split(part, most):
        runs = runs_between(piece, piece, part, 1)
        assert volume(piece) <= most
        assert (runs.target, runs.length, runs.steps) == (behind, volume(piece), ())
        behind += volume(piece)
    assert behind == volume(part)
