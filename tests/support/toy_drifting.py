"""A training that is not deterministic, for tests of what is said about that."""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun


def train(run: TrainingRun, epochs: int = 3) -> None:
    """Log a loss that no seed governs, and a step count that is always the same."""
    model = nn.Linear(1, 1)
    loader = StatefulDataLoader(TensorDataset(torch.zeros(32, 1)), batch_size=4)
    run.track(model=model, loader=loader)
    for _epoch in run.epochs(epochs):
        for _batch in run.steps(loader):
            run.log(loss=int.from_bytes(os.urandom(4), "big") / 2**32, steps=float(run.step))
            time.sleep(float(os.environ.get("TOY_STEP_SECONDS", "0")))
