"""Training functions for the resume harness, one for each way in which people write loops.

Each is ``loop(run, here)``: an ordinary training with ``here(...)`` between its lines, where
random numbers are drawn from every global generator and written down.
"""

from __future__ import annotations

from typing import Any

import torch
from support.resume_harness import Recorder, Training
from support.resume_loaders import (
    BATCH,
    EPOCHS,
    LOADERS,
    Counting,
    Noisy,
    Task,
    fixed,
    own_generator,
    seed_everything,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun


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


def wraps_its_model(run: TrainingRun, here: Recorder) -> None:
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
        wraps_its_model,
    )
}
