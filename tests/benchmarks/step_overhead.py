"""What `run.steps` and `run.log` cost a step when no save is due, in alternation with a bare loop.

``python tests/benchmarks/step_overhead.py [ROUNDS]``: prints the medians in microseconds a step.
The loader is the same torchdata loader in both, and the events go to a file as in a real trainer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import EventLog
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import TrainSpec

STEPS = 5_000


def loop(batches: Iterable[object], run: TrainingRun | None) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in batches:
        if run is not None:
            run.log(loss=0.5)
    return (time.perf_counter() - started) / STEPS


def main(rounds: int) -> None:
    warnings.simplefilter("ignore")
    bare: list[float] = []
    ours: list[float] = []

    def train(run: TrainingRun) -> None:
        data = TensorDataset(torch.zeros(STEPS))
        loader = StatefulDataLoader(data, batch_size=None)
        run.track(loader=loader)
        for _ in run.epochs(rounds):
            bare.append(loop(StatefulDataLoader(data, batch_size=None), None))
            ours.append(loop(run.steps(loader), run))

    with tempfile.TemporaryDirectory() as folder:
        config = CheckpointConfig(
            store=StoreConfig(url=folder), schedule=ScheduleConfig(every=3600.0, final=False)
        )
        spec = TrainSpec(entrypoint="b:train", run="overhead", invocation="one", config=config)
        AttemptRunner(spec, EventLog(Path(folder) / "events")).execute(train)
    for name, seconds in (("bare loop", bare), ("run.steps + run.log", ours)):
        print(f"{name}: {statistics.median(seconds) * 1e6:.1f} us a step")
    overhead = statistics.median(ours) - statistics.median(bare)
    print(f"overhead: {overhead * 1e6:.1f} us a step")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
