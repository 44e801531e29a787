"""The arena, and the image of files that it holds."""

from __future__ import annotations

import ctypes
import os

import pytest
from support.made_runs import State, Tensor

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.image import Planner, plan_image
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.safetensors import HEADER_ALIGNMENT, parse_header


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_memory_is_reused_and_aligned() -> None:
    """A save of the same size, or a smaller one, gets the same pages."""
    arena = Arena()
    first = arena.reserve(10_000)
    address = _address(first)
    assert (first.nbytes, address % 4096) == (10_000, 0)
    first.release()

    again = arena.reserve(5_000)
    assert (again.nbytes, _address(again)) == (5_000, address)


def test_grown_memory_is_as_large_as_asked() -> None:
    """A state that has grown fits, and so does one without tensors."""
    arena = Arena()
    arena.reserve(4096)
    large = arena.reserve(3 * 4096 + 1)
    large[-1] = 7
    assert large.nbytes == 3 * 4096 + 1
    assert Arena().reserve(0).nbytes == 0


def test_prepared_memory_is_there_when_it_is_needed() -> None:
    """It is touched in the background: what a save copies has its pages already."""
    arena, size = Arena(), 48 * 1024 * 1024 + 5
    before = _resident()
    arena.prepare(size)
    view = arena.reserve(size)
    assert _resident() - before > 0.9 * size
    assert view.nbytes == size
    arena.prepare(2 * size)  # there is an arena already: it grows when it has to
    assert _address(arena.reserve(size)) == _address(view)


def _resident() -> int:
    """Bytes of this process that are in memory, shared ones too."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_files_of_an_image_lie_on_pages_without_overlap() -> None:
    """Each begins with a header that says where its tensors are."""
    state = State(
        {},
        [
            Tensor("model", "w", bytes(range(24)), "F32", (2, 3)),
            Tensor("optimizer", "step", b"1234", "F32", ()),
            Tensor("model", "empty", b"", "F32", (0,)),
            Tensor("model", "b", b"ab", "I16", (1,)),
        ],
    )
    image = plan_image(state.tensors)
    memory = Arena().reserve(image.size)
    image.fill(memory, state)

    end = 0
    for file in image.files:
        assert file.start % HEADER_ALIGNMENT == 0
        assert file.start >= end
        end = file.start + file.size
        content = memory[file.start : end]
        specs = parse_header(bytes(content[: len(file.header)]))
        for position in file.positions:
            tensor = state.tensors[position]
            start = image.offsets[position] - file.start
            assert bytes(content[start : start + len(tensor.data)]) == tensor.data
            assert specs[tensor.key][1] == start - len(file.header)
    assert image.size % HEADER_ALIGNMENT == 0


def test_plan_is_made_once_for_states_alike() -> None:
    """Another value changes nothing; another name, shape or dtype does."""
    planner = Planner()
    first = planner.plan(State({}, [Tensor("a", "x", b"1234")]))
    assert planner.plan(State({}, [Tensor("a", "x", b"5678")])) is first
    for other in (
        Tensor("a", "y", b"1234"),
        Tensor("b", "x", b"1234"),
        Tensor("a", "x", b"12345"),
        Tensor("a", "x", b"1234", "F32", (1,)),
    ):
        assert planner.plan(State({}, [other])) is not first


def test_want_of_memory_is_a_save_that_fails() -> None:
    """Not a training that does: it says what was needed, and a smaller state still fits."""
    arena = Arena()
    arena.prepare(2**62)
    with pytest.raises(StoreError, match=f"no memory to stage a checkpoint: {2**62} bytes"):
        arena.reserve(2**62)
    assert arena.reserve(10).nbytes == 10
