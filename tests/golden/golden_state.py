"""The state that the golden checkpoints hold, made anew: what was saved, and what to compare with.

Nothing here is drawn from a generator, so that it is the same under every release of torch.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

WORDS, WIDTH = 5, 4


class TiedModel(nn.Module):
    """An embedding in bfloat16 whose weights are its output layer's too, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, dtype=torch.bfloat16)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight


def trained(steps: int) -> tuple[TiedModel, torch.optim.Optimizer]:
    """A model and an optimizer with momentum, as if after so many steps.

    Filled in rather than trained: a release of torch may round another way.
    """
    model = TiedModel()
    groups = [
        {"params": [model.embedding.weight], "lr": 0.5},
        {"params": [*model.middle.parameters(), *model.norm.parameters()], "weight_decay": 0.25},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.125, momentum=0.5)
    for number, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel()).reshape(parameter.shape) / 8 + steps
        parameter.data.copy_(values)
        buffer = torch.full_like(parameter.data, number + steps / 4)
        optimizer.state[parameter] = {"momentum_buffer": buffer}
    model.norm.num_batches_tracked.fill_(steps)
    return model, optimizer


def loop_state(step: int) -> dict[str, Any]:
    """Every kind of plain value that a tracked dict may hold."""
    return {
        "by_step": {1: "one", -2: 2.5, step: None},
        "pair": (step, (True, "ü\n")),
        "limits": [float("nan"), float("inf"), float("-inf"), -0.0, 2**70],
        "raw": b"\x00\xff",
        "best": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3, dtype=torch.int32),
        "complex": torch.tensor([1 + 2j]),
        "transposed": torch.arange(6).reshape(2, 3).t(),
    }


def seed_generators(seed: int) -> None:
    """All global generators, by algorithms that are the same in every release."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
