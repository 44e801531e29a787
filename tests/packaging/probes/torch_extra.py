"""With torch, a training function is trained, saved, and found complete by the next call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import ckpt_tasks

assert ckpt_tasks.TrainingRun is not None
assert torch.version.cuda is None or torch.cuda.device_count() >= 0

Path("job.py").write_text(
    """
import torch

def train(run, lr: float = 0.1, epochs: int = 2):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    loader = torch.utils.data.DataLoader(torch.ones(12, 2), batch_size=4)
    run.track(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(epochs):
        for batch in run.steps(loader):
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
"""
)
command = str(Path(sys.executable).with_name("ckpt-tasks"))
train = [command, "train", "job:train", "--run", "probe", "--store", "store", "-p", "lr=0.05"]
for _ in range(2):
    answer = subprocess.run(train, capture_output=True, text=True)
    assert answer.returncode == 0, answer
answer = subprocess.run(
    [command, "runs", "--store", "store", "--json"], capture_output=True, text=True
)
(run,) = json.loads(answer.stdout)
assert run["completed"], run
assert run["attempts"] >= 1, run
