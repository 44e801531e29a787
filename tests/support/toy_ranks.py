"""A small deterministic training on several ranks, slow enough to be killed in its midst.

Environment
-----------
TOY_STEP_SECONDS
    Pause of every step; default none.
TOY_KILL
    File with a step in it: rank 1 kills itself when it has done that step, once.
TOY_DIGEST
    File that receives, of rank 0, the digest of the final model and optimizer, whole.
TOY_SETTLE
    If set, every step waits for the save in flight.
TOY_DRAWN
    File to which every rank appends "epoch sample" for what it draws.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from support.toy_training import _write_digest
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.utils.data import DataLoader, TensorDataset

from ckpt_tasks import ResumableDistributedSampler, TrainingRun

SAMPLES, FEATURES, BATCH = 48, 6, 2


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True).sin(), torch.arange(SAMPLES))


def ddp(run: TrainingRun, epochs: int = 2) -> None:
    """Data parallel."""
    _train(run, epochs, nn.parallel.DistributedDataParallel)


def alone(run: TrainingRun, epochs: int = 2) -> None:
    """The same on one rank, without a process group."""
    _train(run, epochs, None)


def fsdp(run: TrainingRun, epochs: int = 2) -> None:
    """Fully sharded."""
    from torch.distributed.fsdp import fully_shard

    _train(run, epochs, fully_shard)


def uneven(run: TrainingRun, epochs: int = 2) -> None:
    """Data parallel, where rank 1 keeps a hundred times as much of its own as rank 0."""
    kept = _Kept(100_000 if os.environ["RANK"] == "1" else 1_000)
    _train(run, epochs, nn.parallel.DistributedDataParallel, kept=kept)


def _train(run: TrainingRun, epochs: int, wrap: Any, **tracked: _Kept) -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 1))
    if wrap is not None:
        dist.init_process_group("gloo")
        model = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = _data()
    loader = DataLoader(data, BATCH, sampler=ResumableDistributedSampler(data, seed=1))
    run.track(model=model, optimizer=optimizer, loader=loader, **tracked)
    for epoch in run.epochs(epochs):
        for inputs, targets, samples in run.steps(loader):
            _note_drawn(epoch, samples)
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss.item())
            if "TOY_SETTLE" in os.environ:
                run.report()
            if wrap is not None and dist.get_rank() == 1:
                _perhaps_die(run.step + 1)
            for kept in tracked.values():
                kept.values += loss.detach()
            time.sleep(float(os.environ.get("TOY_STEP_SECONDS", "0")))
        if wrap is not None and dist.get_rank() == 1:
            run.log(loss=0.0)  # a second value for the step, of which people are warned
    if wrap is None:
        return
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        _write_digest(*(_Made(state) for state in states))
    dist.barrier()
    dist.destroy_process_group()


def _note_drawn(epoch: int, samples: torch.Tensor) -> None:
    path = os.environ.get("TOY_DRAWN")
    if path:
        with open(path, "a", encoding="ascii") as file:
            file.write("".join(f"{epoch} {sample}\n" for sample in samples.tolist()))


def _perhaps_die(step: int) -> None:
    order = Path(os.environ.get("TOY_KILL", ""))
    if order.is_file() and int(order.read_text("ascii")) == step:
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class _Kept:
    """Values that change with every step."""

    def __init__(self, size: int) -> None:
        self.values = torch.zeros(size)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class _Made:
    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state
