"""A training whose loader has worker processes, for tests of what becomes of them."""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun


def train(run: TrainingRun, epochs: int = 3) -> None:
    """Fit one layer, slowly if ``TOY_STEP_SECONDS`` says so."""
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(32.0).reshape(16, 2))
    loader = StatefulDataLoader(data, batch_size=4, num_workers=2)
    run.track(model=model, optimizer=optimizer, loader=loader)
    for _epoch in run.epochs(epochs):
        for (inputs,) in run.steps(loader):
            optimizer.zero_grad()
            model(inputs).mean().backward()
            optimizer.step()
            time.sleep(float(os.environ.get("TOY_STEP_SECONDS", "0")))
