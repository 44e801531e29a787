"""A small training task, data loaders of every kind, and the ordinary loop over any of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from support.resume_harness import Recorder, Training
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import ResumableDistributedSampler, SeededDataset, TrainingRun

SAMPLES, BATCH, EPOCHS = 7, 2, 3

LoaderMaker = Callable[[], Any]


def seed_everything(seed: int = 11) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Noisy(Dataset[Any]):
    """Samples with random augmentation from all three global generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(1))  # noqa: S311
        return torch.full((3,), index + noise)


class Counting(IterableDataset[Any]):
    """A stateful iterable data set, with random augmentation."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < SAMPLES:
            self.position += 1
            yield torch.full((3,), self.position + float(torch.rand(1)))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Task:
    """A tiny model with dropout and its optimizer, made alike in every attempt."""

    def __init__(self) -> None:
        seed_everything()
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)

    @property
    def tracked(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.scheduler,
        }

    def loss(self, batch: Any) -> torch.Tensor:
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        return self.model(batch).square().mean()

    def update(self, batch: Any) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def fixed(samples: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.arange(samples * 3.0).reshape(samples, 3) / samples)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def resumable(dataset: Noisy) -> ResumableDistributedSampler:
    return ResumableDistributedSampler(dataset, num_replicas=2, rank=1, seed=9)


WEIGHTS = [1.0, 5.0, 1.0, 3.0, 1.0, 1.0, 2.0]

LOADERS: dict[str, LoaderMaker] = {
    "stateful": lambda: StatefulDataLoader(Noisy(), BATCH, shuffle=True),
    "stateful, in order": lambda: StatefulDataLoader(Noisy(), BATCH),
    "stateful, own generator": lambda: StatefulDataLoader(
        Noisy(), BATCH, shuffle=True, generator=own_generator()
    ),
    "stateful, drop_last": lambda: StatefulDataLoader(Noisy(), BATCH, shuffle=True, drop_last=True),
    "stateful, torch's random sampler": lambda: StatefulDataLoader(
        Noisy(), BATCH, sampler=RandomSampler(Noisy())
    ),
    "stateful, weighted": lambda: StatefulDataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler(WEIGHTS, SAMPLES)
    ),
    "stateful, weighted, own generator": lambda: StatefulDataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler(WEIGHTS, SAMPLES, generator=own_generator())
    ),
    "stateful, subset sampler": lambda: StatefulDataLoader(
        Noisy(), BATCH, sampler=SubsetRandomSampler(range(1, SAMPLES))
    ),
    "stateful, batch sampler": lambda: StatefulDataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), BATCH, drop_last=False)
    ),
    "stateful, distributed sampler": lambda: StatefulDataLoader(
        Noisy(14), BATCH, sampler=DistributedSampler(Noisy(14), num_replicas=2, rank=1)
    ),
    "stateful, iterable": lambda: StatefulDataLoader(Counting(), BATCH),
    "plain": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "plain, in order": lambda: DataLoader(Noisy(), BATCH),
    "plain, own generator": lambda: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=own_generator()
    ),
    "plain, drop_last": lambda: DataLoader(Noisy(), BATCH, shuffle=True, drop_last=True),
    "plain, no batches": lambda: DataLoader(Noisy(4), batch_size=None, shuffle=True),
    "plain, weighted": lambda: DataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler(WEIGHTS, SAMPLES)
    ),
    "plain, weighted, own generator": lambda: DataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler(WEIGHTS, SAMPLES, generator=own_generator())
    ),
    "plain, replacement": lambda: DataLoader(
        Noisy(), BATCH, sampler=RandomSampler(Noisy(), replacement=True, num_samples=SAMPLES)
    ),
    "plain, subset sampler": lambda: DataLoader(
        Noisy(), BATCH, sampler=SubsetRandomSampler(range(1, SAMPLES))
    ),
    "plain, distributed sampler": lambda: DataLoader(
        Noisy(14), BATCH, sampler=DistributedSampler(Noisy(14), num_replicas=2, rank=1)
    ),
    "plain, resumable": lambda: DataLoader(Noisy(), BATCH, sampler=resumable(Noisy())),
    "plain, resumable, drop_last": lambda: DataLoader(
        Noisy(14), BATCH, drop_last=True, sampler=resumable(Noisy(14)), generator=own_generator()
    ),
    "stateful, resumable": lambda: StatefulDataLoader(Noisy(), BATCH, sampler=resumable(Noisy())),
    "plain, empty": lambda: DataLoader(Noisy(1), BATCH, drop_last=True),
}

WORKER_LOADERS: dict[str, LoaderMaker] = {
    "stateful, 2 workers": lambda: StatefulDataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, shuffle=True, num_workers=2
    ),
    "stateful, 2 persistent workers": lambda: StatefulDataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "stateful, resumable, 2 workers": lambda: StatefulDataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, sampler=resumable(Noisy()), num_workers=2
    ),
    "plain, resumable, 2 persistent workers": lambda: DataLoader(
        SeededDataset(Noisy(), seed=3),
        BATCH,
        sampler=resumable(Noisy()),
        num_workers=2,
        persistent_workers=True,
    ),
    "plain, 2 workers": lambda: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2),
    "plain, 2 persistent workers": lambda: DataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    ),
}


def ordinary(
    make_loader: LoaderMaker, *, leave_early: bool = False, epochs: int = EPOCHS
) -> Training:
    """The loop of the documentation, over any loader; or one whose inner loop is left early."""

    def train(run: TrainingRun, here: Recorder) -> None:
        task = Task()
        loader = make_loader()
        here("setup before track")
        run.track(**task.tracked, loader=loader)
        here("setup")
        for epoch in run.epochs(epochs):
            here("head", epoch)
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            here("head")
            for batch in run.steps(loader):
                here("batch", batch, run.step, run.epoch)
                run.log(loss=task.update(batch))
                here("updated")
                if leave_early and run.batch == 1:
                    break
                here("last line")
            here("epoch end", run.step)
            task.scheduler.step()
            run.log({"lr": task.scheduler.get_last_lr()[0]})
            here("epoch over")
        here("after")
        here("after")
        here.end(*task.tracked.values())

    return train
