"""Trainings that fail at a step of their own choice; saved every 5 steps, they stop at 16."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun

STEPS = 16


def poisoned(run: TrainingRun) -> None:
    """Its state goes bad before it is saved at step 10: all that have it fail in step 12."""
    for step in _train(run):
        if step == 12 and not (run.resumed_from or "").startswith("step-00000005"):
            raise ValueError(f"bad state in {object()}")


def hopeless(run: TrainingRun) -> None:
    """Fails in step 12, whatever it started from."""
    for step in _train(run):
        if step == 12:
            raise ValueError(f"bad data in {object()}")


def preempted(run: TrainingRun) -> None:
    """Each of the first three attempts is killed in another step behind the newest checkpoint."""
    for step in _train(run):
        if run.attempt <= 3 and step == 11 + run.attempt:
            os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(run: TrainingRun) -> None:
    """Each of the first three attempts is killed in step 12."""
    for step in _train(run):
        if run.attempt <= 3 and step == 12:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(run: TrainingRun):  # type: ignore[no-untyped-def]
    """Yields the number of each step while it is under way, from 1."""
    torch.manual_seed(7)
    model = torch.nn.Linear(6, 1)
    loader = StatefulDataLoader(TensorDataset(torch.randn(32, 6)), batch_size=4, shuffle=True)
    run.track(model=model, loader=loader)
    for _epoch in run.epochs(2):
        for _batch in run.steps(loader):
            if run.step >= 10:
                time.sleep(0.15)  # progress is told ten times a second
            yield run.step + 1
