"""Training functions for the resume harness, one for each way in which people write loops.

Each is ``case(run, here)``: an ordinary training with ``here(...)`` between its lines, where
random numbers are drawn from every global generator and written down.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from support.resume_harness import Recorder, Training
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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

from ckpt_tasks import SeededDataset, TrainingRun

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


# -- loaders ----------------------------------------------------------------------------------


def fixed(samples: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.arange(samples * 3.0).reshape(samples, 3) / samples)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


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
    "plain, empty": lambda: DataLoader(Noisy(1), BATCH, drop_last=True),
}

WORKER_LOADERS: dict[str, LoaderMaker] = {
    "stateful, 2 workers": lambda: StatefulDataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, shuffle=True, num_workers=2
    ),
    "stateful, 2 persistent workers": lambda: StatefulDataLoader(
        SeededDataset(Noisy(), seed=3), BATCH, shuffle=True, num_workers=2, persistent_workers=True
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


# -- loops ------------------------------------------------------------------------------------


def _begin(run: TrainingRun, here: Recorder, **more: Any) -> tuple[Task, Any]:
    task = Task()
    loader = more.pop("loader", None)
    loader = LOADERS["stateful"]() if loader is None else loader
    here("setup before track")
    run.track(**task.tracked, loader=loader, **more)
    here("setup")
    return task, loader


def _begin_by_hand(run: TrainingRun) -> tuple[Task, Any]:
    """Nothing is drawn behind `track`, where generators are set back for loops kept whole."""
    task, loader = Task(), LOADERS["stateful"]()
    run.track(**task.tracked, loader=loader)
    return task, loader


def continues(run: TrainingRun, here: Recorder) -> None:
    """`continue` is an ordinary end of a step."""
    task, loader = _begin(run, here)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            if run.batch % 2:
                continue
            run.log(loss=task.update(batch))
            here("updated")
        here("epoch end")
    here.end(*task.tracked.values())


def raises_in_a_step(run: TrainingRun, here: Recorder) -> None:
    """An exception that the step itself handles."""
    task, loader = _begin(run, here)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            try:
                if run.step % 3 == 1:
                    raise ValueError("a bad batch")
                run.log(loss=task.update(batch))
            except ValueError:
                here("handled")
        here("epoch end")
    here.end(*task.tracked.values())


def raises_out_of_the_inner_loop(run: TrainingRun, here: Recorder) -> None:
    """An exception that ends the inner loop, and is handled behind it."""
    task, loader = _begin(run, here)
    for epoch in run.epochs(EPOCHS):
        try:
            for batch in run.steps(loader):
                here("batch", batch)
                run.log(loss=task.update(batch))
                if epoch == 1 and run.batch == 1:
                    raise ValueError("a bad batch")
        except ValueError:
            here("handled")
        here("epoch end", run.step)
        task.scheduler.step()
    here.end(*task.tracked.values())


def accumulates(run: TrainingRun, here: Recorder) -> None:
    """Gradients of three micro-batches make a step; the last step has fewer."""
    loader = StatefulDataLoader(Noisy(10), BATCH, shuffle=True, generator=own_generator())
    task, loader = _begin(run, here, loader=loader)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader, accumulate=3):
            here("micro-batch", batch, run.step, run.is_step_boundary)
            task.loss(batch).backward()
            if run.is_step_boundary:
                task.optimizer.step()
                task.optimizer.zero_grad()
                run.log(stepped=run.step)
                here("updated")
        here("epoch end")
    here.end(*task.tracked.values())


def accumulates_and_breaks(run: TrainingRun, here: Recorder) -> None:
    """The inner loop is left between two micro-batches of one step."""
    task, loader = _begin(run, here, loader=DataLoader(Noisy(10), BATCH, shuffle=True))
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader, accumulate=2):
            here("micro-batch", batch, run.step, run.is_step_boundary)
            task.update(batch)
            if run.batch == 2:
                break
        here("epoch end", run.step)
    here.end(*task.tracked.values())


def validates(run: TrainingRun, here: Recorder) -> None:
    """Validation inside and behind the inner loop, by tracked and untracked loaders."""
    seed_everything()
    untracked = DataLoader(fixed(), 3, shuffle=True)
    stateful = StatefulDataLoader(Noisy(4), 2, shuffle=True, generator=own_generator())
    plain = DataLoader(Noisy(4), 2, shuffle=True, generator=own_generator())
    task, loader = _begin(run, here, stateful=stateful, plain=plain)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
            if run.step % 2:
                task.model.eval()
                for seen in untracked:
                    here("validation", seen)
                for seen in stateful:
                    here("validation", seen)
                task.model.train()
        for seen in plain:
            here("validation", seen)
        for seen in stateful:
            here("validation", seen)
        run.log(val_loss=float(task.loss(torch.ones(1, 3)).detach()))
    here.end(*task.tracked.values())


def stops_in_a_step(run: TrainingRun, here: Recorder) -> None:
    """`run.stop()` ends both loops at the next boundary; the epoch's last code still runs."""
    task, loader = _begin(run, here)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
            if run.step == 5:
                run.stop()
            here("last line")
        here("epoch end", run.step)
        task.scheduler.step()
    here("after")
    here.end(*task.tracked.values())


def stops_while_accumulating(run: TrainingRun, here: Recorder) -> None:
    """`run.stop()` between two micro-batches lets the step be completed."""
    task, loader = _begin(run, here)
    for _ in run.epochs(EPOCHS):
        for batch in run.steps(loader, accumulate=2):
            here("micro-batch", batch, run.is_step_boundary)
            task.update(batch)
            if run.epoch == 1 and run.batch == 0:
                run.stop()
        here("epoch end", run.step)
    here("after")
    here.end(*task.tracked.values())


def stops_early(run: TrainingRun, here: Recorder) -> None:
    """Early stopping by `run.state` and `run.stop()` behind the inner loop."""
    task, loader = _begin(run, here)
    run.state.setdefault("best", float("inf"))
    run.state.setdefault("patience", 1)
    for epoch in run.epochs(9):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
        score = [5.0, 3.0, 4.0, 6.0][epoch]
        if score < run.state["best"]:
            run.state["best"] = score
        else:
            run.state["patience"] -= 1
        here("epoch end", run.state)
        if run.state["patience"] < 0:
            run.stop()
    here("after", run.state)
    here.end(*task.tracked.values(), run.state)


def breaks_out_of_both(run: TrainingRun, here: Recorder) -> None:
    """Both loops are left by `break`, and nothing comes behind them."""
    task, loader = _begin(run, here)
    for epoch in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
            if epoch == 1 and run.batch == 1:
                break
        if epoch == 1:
            break
        here("epoch end")
        task.scheduler.step()
    here.end(*task.tracked.values())


def breaks_at_an_epochs_end(run: TrainingRun, here: Recorder) -> None:
    """Early stopping by a `break` behind the inner loop."""
    task, loader = _begin(run, here)
    for epoch in run.epochs(EPOCHS):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
        task.scheduler.step()
        run.state["epochs"] = epoch + 1
        if epoch == 1:
            break
    here.end(*task.tracked.values(), run.state)


def alternates_loaders(run: TrainingRun, here: Recorder) -> None:
    """Two loaders take turns by epoch; both inner loops are left early."""
    seed_everything()
    one = StatefulDataLoader(Noisy(), BATCH, shuffle=True)
    two = DataLoader(Noisy(), BATCH, shuffle=True, generator=own_generator())
    three = StatefulDataLoader(Counting(), BATCH)
    task, _ = _begin(run, here, loader=one, two=two, three=three)
    for epoch in run.epochs(6):
        for batch in run.steps([one, two, three][epoch % 3]):
            here("batch", batch)
            run.log(loss=task.update(batch))
            if run.batch == 1:
                break
        here("epoch end")
    here.end(*task.tracked.values())


def skips_an_inner_loop(run: TrainingRun, here: Recorder) -> None:
    """An epoch without an inner loop is an epoch nonetheless."""
    task, loader = _begin(run, here)
    for epoch in run.epochs(4):
        here("head")
        if epoch % 2:
            here("epoch without steps")
            continue
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
    here.end(*task.tracked.values())


def trains_in_two_phases(run: TrainingRun, here: Recorder) -> None:
    """Two loops over epochs, one after the other, go on counting."""
    task, loader = _begin(run, here)
    for epoch in run.epochs(2):
        for batch in run.steps(loader):
            here("batch", batch, epoch)
            run.log(loss=task.update(batch))
        here("epoch end")
    here("setup of the second phase")
    for epoch in run.epochs(4):
        for batch in run.steps(loader):
            here("batch", batch, epoch)
            run.log(loss=task.update(batch))
        here("epoch end")
    here("after")
    here.end(*task.tracked.values())


def trains_two_models(run: TrainingRun, here: Recorder) -> None:
    """Several models, optimizers and an average of weights."""
    other = Task()
    task, loader = Task(), LOADERS["plain"]()
    average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    momentum = torch.optim.SGD(other.model.parameters(), lr=0.01, momentum=0.9)
    here("setup before track")
    run.track(**task.tracked, loader=loader, other=other.model, momentum=momentum, average=average)
    for _ in run.epochs(2):
        for batch in run.steps(loader):
            here("batch", batch)
            task.update(batch)
            momentum.zero_grad()
            other.loss(batch).backward()
            momentum.step()
            here("both updated")
            average.update_parameters(task.model)
        here("epoch end")
    here.end(*task.tracked.values(), other.model, momentum, average)


def saves_by_hand_inside(run: TrainingRun, here: Recorder) -> None:
    """`run.save()` in the loops waits for the next boundary."""
    task, loader = _begin(run, here)
    for _ in run.epochs(2):
        here("head")
        for batch in run.steps(loader):
            here("batch", batch)
            if run.step == 2:
                run.save("because")
            run.log(loss=task.update(batch))
            here("updated")
        run.save()
        here("epoch end")
    here.end(*task.tracked.values())


def logs_anywhere(run: TrainingRun, here: Recorder) -> None:
    """Metrics before, between, in and behind the loops, and twice for one step."""
    task = Task()
    loader = LOADERS["stateful"]()
    run.log(parameters=21)
    run.track(**task.tracked, loader=loader)
    run.log(begun=1)
    for epoch in run.epochs(2):
        here("head")
        run.log(lr=task.scheduler.get_last_lr()[0], epoch=epoch)
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=0.0)
            run.log(loss=task.update(batch))
        here("epoch end")
        run.log(loss=-1.0, val_loss=float(epoch))
        task.scheduler.step()
    run.log(final=3.0)
    here("after")
    here.end(*task.tracked.values())


def keeps_its_loops(run: TrainingRun, here: Recorder) -> None:
    """Both loops kept whole: `step_done()` by hand, position in `run.state`."""
    task, loader = _begin_by_hand(run)
    for epoch in range(run.state.get("epoch", 0), EPOCHS):
        for batch in loader:
            here("batch", batch, epoch)
            run.log(loss=task.update(batch))
            here("updated")
            run.step_done()
        here("epoch end", run.step)
        task.scheduler.step()
        run.state["epoch"] = epoch + 1
        run.save()
    here("after")
    here.end(*task.tracked.values())


def saves_without_steps(run: TrainingRun, here: Recorder) -> None:
    """Loops kept whole that only call `run.save()`."""
    task, loader = _begin_by_hand(run)
    for epoch in range(run.state.get("epoch", 0), EPOCHS):
        for batch in loader:
            here("batch", batch, epoch)
            task.update(batch)
        run.state["epoch"] = epoch + 1
        run.save()
    here("after")
    here.end(*task.tracked.values())


def keeps_its_inner_loop(run: TrainingRun, here: Recorder) -> None:
    """`run.epochs` outside, an inner loop kept whole."""
    loader = LOADERS["stateful, distributed sampler"]()
    task, _ = _begin(run, here, loader=loader)
    for epoch in run.epochs(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            here("batch", batch, epoch)
            run.log(loss=task.update(batch))
            run.state["seen"] = run.state.get("seen", 0) + 1
            run.step_done()
        here("epoch end", run.step, run.state["seen"])
        task.scheduler.step()
    here.end(*task.tracked.values())


def compiles(run: TrainingRun, here: Recorder) -> None:
    """The model is wrapped before `track` in one attempt and behind it in the next."""
    task, loader = Task(), LOADERS["stateful"]()
    model = task.model
    wrapped_early = run.attempt % 2 == 1
    if wrapped_early:
        task.model = nn.DataParallel(model)
    run.track(**task.tracked, loader=loader)
    if not wrapped_early:
        task.model = nn.DataParallel(model)
    for _ in run.epochs(2):
        for batch in run.steps(loader):
            here("batch", batch)
            run.log(loss=task.update(batch))
        here("epoch end")
    here.end(model, task.optimizer)


LOOPS: dict[str, Training] = {
    loop.__name__: loop
    for loop in (
        continues,
        raises_in_a_step,
        raises_out_of_the_inner_loop,
        accumulates,
        accumulates_and_breaks,
        validates,
        stops_in_a_step,
        stops_while_accumulating,
        stops_early,
        breaks_out_of_both,
        breaks_at_an_epochs_end,
        alternates_loaders,
        skips_an_inner_loop,
        trains_in_two_phases,
        trains_two_models,
        saves_by_hand_inside,
        logs_anywhere,
        keeps_its_loops,
        saves_without_steps,
        keeps_its_inner_loop,
        compiles,
    )
}
