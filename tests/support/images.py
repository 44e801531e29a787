"""The bytes of tensor images, as a save stages them."""

from __future__ import annotations

from ckpt_tasks.state.staging import copy_images
from ckpt_tasks.state.tensors import TensorImage


def bytes_of(image: TensorImage) -> bytearray:
    """Row-major, in memory of their own."""
    data = bytearray(image.nbytes)
    copy_images([image], memoryview(data), [0])
    return data
