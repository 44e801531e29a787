"""A small deterministic training for tests, slow enough to be killed in its midst.

Environment
-----------
TOY_STEP_SECONDS
    Pause of every step; default none.
TOY_DIGEST
    File that receives the digest of the final model, optimizer, scheduler and generators.
TOY_TRACE
    File to which each step appends ``<pid> <number of the step, from 1>``: what really ran.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun

SAMPLES, FEATURES, BATCH = 32, 6, 4
STEPS_PER_EPOCH = SAMPLES // BATCH


def make_loader(seed: int) -> StatefulDataLoader:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    targets = inputs.sum(dim=1, keepdim=True).sin()
    return StatefulDataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)


def train(
    run: TrainingRun, lr: float = 0.01, epochs: int = 4, width: int = 8, seed: int = 7
) -> None:
    """Fit a tiny MLP with dropout.

    Parameters
    ----------
    lr
        Learning rate of AdamW.
    epochs
        Passes over the data, 8 steps each.
    width
        Hidden units.
    seed
        Of the weights, the data and every global generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(FEATURES, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = make_loader(seed)
    run.track(model=model, optimizer=optimizer, lr_scheduler=scheduler, loader=loader)
    for _epoch in run.epochs(epochs):
        for inputs, targets in run.steps(loader):
            noise = random.random() * 1e-3 + float(np.random.rand()) * 1e-3  # noqa: S311
            loss = nn.functional.mse_loss(model(inputs + noise), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss.item())
            _trace(run.step + 1)
            time.sleep(float(os.environ.get("TOY_STEP_SECONDS", "0")))
        run.log(weight_norm=sum(float(p.detach().norm()) for p in model.parameters()))
        scheduler.step()
    _write_digest(model, optimizer, scheduler)


def crash(run: TrainingRun, lr: float = 0.01) -> None:
    """Fail before the first step, as a bug in the user's code does."""
    raise RuntimeError(f"this training always fails (lr={lr})")


def untrackable(run: TrainingRun, lr: float = 0.01) -> None:
    """Track what cannot be saved without pickle: a mistake that no retry mends."""
    run.track(model=nn.Linear(1, 1), lock=_WithLock())


class _WithLock:
    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved")


def _trace(step: int) -> None:
    path = os.environ.get("TOY_TRACE")
    if path:
        with Path(path).open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()} {step}\n")


def _write_digest(*tracked: Any) -> None:
    path = os.environ.get("TOY_DIGEST")
    if not path:
        return
    states = [
        *(thing.state_dict() for thing in tracked),
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    ]
    digest = hashlib.sha256()
    for part in _flatten(states):
        digest.update(part)
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(digest.hexdigest(), encoding="ascii")
    temporary.replace(path)


def _flatten(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _flatten(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield repr(value).encode()
