"""What several tests of state share: a round trip through the bytes that would be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
import torch
from support.images import bytes_of

from ckpt_tasks.state.capture import CapturedState, capture, restore_values
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.state.tensors import tensor_from_buffer


def restored(captured: CapturedState) -> RestoredValues:
    """Values from the JSON of the trees and fresh copies of the images' bytes."""

    def tensor_at(index: int) -> torch.Tensor:
        image = captured.tensors[index]
        return tensor_from_buffer(bytes_of(image), image.dtype, image.shape)

    return restore_values(msgspec.json.decode(msgspec.json.encode(captured.trees)), tensor_at)


@pytest.fixture
def through_storage() -> Callable[[Mapping[str, Any]], RestoredValues]:
    """Capture items, and give back what comes out of their bytes."""
    return lambda items: restored(capture(items))


@pytest.fixture
def value_through_storage() -> Callable[[Any], Any]:
    """The same for one plain value."""
    return lambda value: restored(capture({"item": value}))["item"]


@pytest.fixture
def bits() -> Callable[[torch.Tensor], bytes]:
    """The values of a tensor as bytes, so that NaN, -0.0 and odd dtypes compare exactly."""
    return lambda tensor: bytes(
        tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .tolist()
    )
