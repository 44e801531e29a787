"""A toy training that fails where a test wants it to; its attempts leave traces in files.

Environment: ``FLAKY_FOLDER`` holds the traces; ``fail`` in it, with a step in it, makes the
attempt that gets there fail; ``fail-always`` makes each of them fail there.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun


def train(run: TrainingRun, lr: float = 0.1, epochs: int = 2, token: str = "") -> None:
    """Fit a line to nothing."""
    torch.manual_seed(0)
    folder = Path(os.environ["FLAKY_FOLDER"])
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loader = StatefulDataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    run.track(model=model, optimizer=optimizer, loader=loader)
    print(f"secret in the environment: {bool(os.environ.get('AWS_SECRET_ACCESS_KEY'))}")
    for _ in run.epochs(epochs):
        for (batch,) in run.steps(loader):
            loss = model(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            with (folder / "steps").open("a") as file:
                file.write(f"{run.step + 1}\n")
            _perhaps_fail(folder, run.step + 1)


def _perhaps_fail(folder: Path, step: int) -> None:
    for name in ("fail", "fail-always"):
        order = folder / name
        if order.exists() and int(order.read_text()) == step:
            if name == "fail":
                order.unlink()
            raise RuntimeError(f"told to fail at step {step}")
