"""How long ``ckpt-tasks ls`` takes to say what a run holds, in alternation with a bare interpreter.

``python tests/benchmarks/startup.py [ROUNDS]``: prints the medians in milliseconds. The run has a
few hundred checkpoints on local disk.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainSpec

CHECKPOINTS = 300
COMMAND = str(Path(sys.executable).with_name("ckpt-tasks"))


def train(run: TrainingRun) -> None:
    """Saves once an epoch."""
    model = torch.nn.Linear(4, 4)
    run.track(model=model)
    for _ in run.epochs(CHECKPOINTS):
        model.weight.data.add_(1.0)


def fill(store: str) -> None:
    """Make the run."""
    spec = TrainSpec(
        entrypoint="startup:train",
        run="toy",
        invocation="one",
        config=CheckpointConfig(
            store=StoreConfig(url=store), schedule=ScheduleConfig(every_epochs=1)
        ),
    )
    outcome = AttemptRunner(spec, lambda _event: None).execute(train)
    assert outcome.done, outcome


def milliseconds(*command: str) -> float:
    """Wall time of a command that succeeds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Alternate, and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        fill(folder)
        bare, listing = [], []
        for _ in range(rounds):
            bare.append(milliseconds(sys.executable, "-c", "pass"))
            listing.append(milliseconds(COMMAND, "ls", "toy", "--store", folder))
    alone, listed = statistics.median(bare), statistics.median(listing)
    print(f"bare interpreter: {alone:.0f} ms")
    print(f"ckpt-tasks ls, {CHECKPOINTS} checkpoints: {listed:.0f} ms ({listed / alone:.1f}x)")


if __name__ == "__main__":
    main()
