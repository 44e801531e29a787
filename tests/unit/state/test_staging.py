"""Staging: copies of tensors' bytes in memory that is given."""

from __future__ import annotations

import pytest
import torch
from support.images import bytes_of

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.staging import copy_images

MEGABYTE = 1024 * 1024


def test_copies_are_at_their_offsets_and_nowhere_else() -> None:
    """Large tensors in pieces and by several threads, small ones between them, gaps untouched."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5 * MEGABYTE,), (3,), (0, 4), (33, 1024, 257), (7 * MEGABYTE + 1,)]
    tensors = [torch.rand(shape, generator=generator) for shape in shapes]
    state = capture({"x": tensors})
    offsets, end = [], 17
    for image in state.tensors:
        offsets.append(end)
        end += image.nbytes + 13
    buffer = bytearray(b"\xa5" * (end + 100))

    state.copy_into(memoryview(buffer), offsets)

    position = 0
    for image, offset in zip(state.tensors, offsets, strict=True):
        assert set(buffer[position:offset]) <= {0xA5}
        position = offset + image.nbytes
        assert buffer[offset:position] == image.data.numpy().tobytes()
    assert set(buffer[position:]) == {0xA5}


def test_copy_is_independent_of_what_training_changes() -> None:
    """Once it returns, the live tensor may change."""
    weight = torch.ones(1000)
    image = capture({"x": weight}).tensors[0]
    copied = bytes_of(image)
    weight.zero_()
    assert copied == torch.ones(1000).numpy().tobytes()


def test_buffer_that_is_too_small_is_refused() -> None:
    """Memory behind it belongs to somebody else."""
    images = capture({"x": torch.ones(4)}).tensors
    with pytest.raises(ValueError, match="does not fit"):
        copy_images(images, memoryview(bytearray(20)), [8])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_device_are_of_the_moment() -> None:
    """Of what was computed before, and of nothing that is launched behind it."""
    arena = Arena()
    weight = torch.zeros(64 * MEGABYTE // 4, device="cuda")
    for value in range(5):
        weight.fill_(value)
        state = capture({"x": weight, "y": torch.ones(3)})
        offsets = [0, 64 * MEGABYTE]
        memory = arena.reserve(64 * MEGABYTE + 12)
        state.copy_into(memory, offsets)
        weight.fill_(-1.0)
        copied = torch.frombuffer(memory[: 64 * MEGABYTE], dtype=torch.float32)
        assert copied.unique().tolist() == [value]
