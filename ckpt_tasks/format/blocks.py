"""Blocks of tensors, and where their bytes lie in row-major memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "Part",
    "Runs",
    "overlap",
    "rest_of",
    "runs_between",
    "share_of_rows",
    "split",
    "volume",
    "whole",
    "without_overlaps",
]


class Part(NamedTuple):
    """A block of a tensor, such as one rank holds: where it begins and its extents, by dimension.

    `replicated` tells that other ranks hold the same part.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    replicated: bool = False


class Runs(NamedTuple):
    """Bytes that lie together both where they are read from and where they go, again and again.

    Parameters
    ----------
    source, target
        First byte of the first run in the memory of either side.
    length
        Bytes of each.
    steps
        How they repeat, the outermost first: how often, and how many bytes further on each side.
    """

    source: int
    target: int
    length: int
    steps: tuple[tuple[int, int, int], ...]

    @property
    def widths(self) -> list[int]:
        """Bytes of the source from the first run to the last, by how many steps have been taken."""
        widths = [self.length]
        for count, source_step, _ in reversed(self.steps):
            widths.append(widths[-1] + (count - 1) * source_step)
        return widths[::-1]


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor."""
    return Part((0,) * len(shape), tuple(shape))


def volume(part: Part) -> int:
    """How many elements a block has."""
    return math.prod(part.sizes)


def share_of_rows(shape: Sequence[int], rank: int, world_size: int) -> Part:
    """The rows that are `rank`'s where all are dealt out as FSDP2 does, and ``torch.chunk``.

    A tensor without dimensions is everybody's.
    """
    if not shape:
        return whole(shape)
    step = -(-shape[0] // world_size)
    start = min(rank * step, shape[0])
    rows = min(step, shape[0] - start)
    return Part((start, *(0,) * (len(shape) - 1)), (rows, *shape[1:]))


def split(part: Part, most: int) -> Iterator[Part]:
    """Blocks of at most so many elements, each of which lies behind the one before in row-major
    memory of `part`; together they are all of it.
    """
    size = volume(part)
    if size <= most:
        yield part
        return
    axis = next(axis for axis, extent in enumerate(part.sizes) if extent > 1)
    extent = part.sizes[axis]
    step = max(1, most * extent // size)
    for start in range(0, extent, step):
        offsets, sizes = list(part.offsets), list(part.sizes)
        offsets[axis], sizes[axis] = offsets[axis] + start, min(step, extent - start)
        yield from split(Part(tuple(offsets), tuple(sizes)), most)


def overlap(one: Part, other: Part) -> Part | None:
    """What two blocks of a tensor have in common."""
    offsets: list[int] = []
    sizes: list[int] = []
    for first, size, other_first, other_size in zip(
        one.offsets, one.sizes, other.offsets, other.sizes, strict=True
    ):
        start = max(first, other_first)
        length = min(first + size, other_first + other_size) - start
        if length <= 0:
            return None
        offsets.append(start)
        sizes.append(length)
    return Part(tuple(offsets), tuple(sizes))


def rest_of(part: Part, without: Part) -> Iterator[Part]:
    """Blocks that together are `part`, but for what `without` has of it."""
    common = overlap(part, without)
    if common is None:
        yield part
        return
    offsets, sizes = list(part.offsets), list(part.sizes)
    for axis, (start, length) in enumerate(zip(*common[:2], strict=True)):
        first, end, stop = offsets[axis], start + length, offsets[axis] + sizes[axis]
        for piece_start, piece_stop in ((first, start), (end, stop)):
            if piece_start < piece_stop:
                offsets[axis], sizes[axis] = piece_start, piece_stop - piece_start
                yield Part(tuple(offsets), tuple(sizes))
        offsets[axis], sizes[axis] = start, length


def without_overlaps(blocks: Sequence[Part]) -> list[Part]:
    """Blocks that together are the same, none of which has anything in common with another."""
    found: list[Part] = []
    for block in blocks:
        left = [block]
        for earlier in found:
            left = [piece for one in left for piece in rest_of(one, earlier)]
        found += left
    return found


def runs_between(common: Part, source: Part, target: Part, unit: int) -> Runs:
    """Where the bytes of a block lie in those of two others that hold it.

    Parameters
    ----------
    common
        Inside of both others; not empty.
    source, target
        Each row-major in memory of its own.
    unit
        Bytes of an element.
    """
    source_first, target_first = 0, 0
    steps: list[tuple[int, int, int]] = []
    length, source_step, target_step = unit, unit, unit
    for axis in reversed(range(len(common.sizes))):
        count, offset = common.sizes[axis], common.offsets[axis]
        source_first += (offset - source.offsets[axis]) * source_step
        target_first += (offset - target.offsets[axis]) * target_step
        repeated, *inner = steps[-1] if steps else (0, 0, 0)
        if not steps and length == source_step == target_step:
            length *= count
        elif [repeated * step for step in inner] == [source_step, target_step]:
            steps[-1] = (repeated * count, *steps[-1][1:])
        elif count > 1:
            steps.append((count, source_step, target_step))
        source_step *= source.sizes[axis]
        target_step *= target.sizes[axis]
    return Runs(source_first, target_first, length, tuple(reversed(steps)))
