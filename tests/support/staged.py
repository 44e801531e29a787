"""States as they lie in the arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.image import plan_image
from ckpt_tasks.state.capture import capture


def nonfinite_of(items: Mapping[str, Any]) -> list[str]:
    """What is found unhealthy once `items` are staged."""
    state = capture(items)
    image = plan_image(state.tensors)
    memory = Arena().reserve(image.size)
    image.fill(memory, state)
    return state.find_nonfinite(memory, image.offsets)
