"""Metrics through whole runs: which a commit record holds, and which are sent before a failure."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun
from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig, RegistryConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import Event, MetricsLogged, Progress
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.store import open_store
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.spec import TrainSpec

URL = "memory://run-metrics"
VAL_LOSSES = [3.0, 2.0, 1.0, 1.5]
STEPS = 6  # of an epoch


def spec(run: str) -> TrainSpec:
    """A save at each epoch's end and every 4 steps."""
    return TrainSpec(
        entrypoint="tests:train",
        run=run,
        invocation="one",
        config=CheckpointConfig(
            store=StoreConfig(url=URL), schedule=ScheduleConfig(every_steps=4, every_epochs=1)
        ),
    )


def execute(run: str, *, stop_in: int | None = None) -> None:
    """Train; stop in that step."""
    events: list[Event] = []
    runner = AttemptRunner(spec(run), events.append)

    def train(training: TrainingRun) -> None:
        loader = StatefulDataLoader(TensorDataset(torch.arange(float(STEPS))), batch_size=1)
        training.track(model=nn.Linear(1, 1), loader=loader)
        for epoch in training.epochs(len(VAL_LOSSES)):
            for _ in training.steps(loader):
                if training.step + 1 == stop_in:
                    runner.request_stop("received SIGTERM")
                if training.step % 2 == 0:
                    training.log(loss=training.step + 1)
            training.log(val_loss=VAL_LOSSES[epoch])

    runner.execute(train)


def view(run: str) -> RunView:
    with open_store(URL) as store:
        return view_run(store, run)


def best_checkpoint(run: str) -> str:
    """Where `best` points once the run is published."""
    memory = RegistryMemory()
    with open_store(URL) as store:
        Publisher(
            store,
            RunLayout(run),
            Fence(store, RunLayout(run), len(view(run).attempts)),
            MemoryRegistry(memory),
            RegistryConfig(best="val_loss:min"),
            RunDescription(run=run, uid=view(run).run.uid, store_url=store.url, hyperparameters={}),
            [].append,
        ).publish()
    (held,) = [v for v in memory.versions if v.version == memory.aliases["best"]]
    return held.checkpoint


def test_a_checkpoint_has_the_metrics_of_its_own_weights() -> None:
    """Every record holds what was logged inside or behind its step and nothing older, also in an
    attempt that resumed; so `best` is the save at the end of the best epoch.
    """
    execute("whole")
    execute("resumed", stop_in=14)
    execute("resumed")
    for run in ("whole", "resumed"):
        checkpoints = view(run).checkpoints
        assert {c.record.trigger for c in checkpoints if c.record} >= {"epoch", "steps"}
        for checkpoint in checkpoints:
            assert checkpoint.record is not None
            step = checkpoint.record.position.step
            expected = {"loss": float(step)} if step % 2 else {}
            if checkpoint.record.trigger in ("epoch", "final"):
                expected["val_loss"] = VAL_LOSSES[step // STEPS - 1]
            assert checkpoint.record.metrics == expected, checkpoint.id
        assert best_checkpoint(run).startswith("step-00000018-")


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_steps_done_before_a_failure_are_reported(raised: type[BaseException]) -> None:
    """However fast they were: their values and the position; not those of the torn step."""
    events: list[Event] = []
    runner = AttemptRunner(spec("failing"), events.append)

    def train(training: TrainingRun) -> None:
        loader = StatefulDataLoader(TensorDataset(torch.arange(float(STEPS))), batch_size=1)
        training.track(model=nn.Linear(1, 1), loader=loader)
        for _ in training.epochs(1):
            for _ in training.steps(loader):
                training.log(loss=training.step + 1)
                if training.step == 3:
                    raise raised

    with pytest.raises(raised):
        runner.execute(train)
    rows = [row for event in events if isinstance(event, MetricsLogged) for row in event.rows]
    assert [(key, step) for key, _, step, _ in rows] == [("loss", 1), ("loss", 2), ("loss", 3)]
    assert [e.position.step for e in events if isinstance(e, Progress)][-1] == 3


def test_a_failed_report_does_not_hide_the_failure() -> None:
    """An accelerator that failed gives no values; what the training raised is what counts."""

    def refuse(event: Event) -> None:
        if isinstance(event, MetricsLogged | Progress):
            raise RuntimeError("device-side assert")  # noqa: TRY004 - as torch does

    def train(training: TrainingRun) -> None:
        training.track(model=nn.Linear(1, 1))
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        AttemptRunner(spec("failing-twice"), refuse).execute(train)
