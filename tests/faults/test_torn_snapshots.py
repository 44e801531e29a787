"""Saves of a training that changes everything at once, all the time: none may be of two moments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.launches import writer_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckpt_tasks import TrainingRun, load_uri
from ckpt_tasks.bench.processes import anonymous_bytes
from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import CheckpointConfig, SaveConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.events import Event, SaveFailed
from ckpt_tasks.store import open_store
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.spec import AttemptFolder, TrainSpec

SAVES, WIDTH = 8, 700
NAMES = ["model", "ema", "optimizer", "scheduler", "scaler"]


class Training:
    """A training in this process, its saves written by a process of their own.

    Parameters
    ----------
    between
        Called in each step, between the boundary and the optimizer's step.
    """

    def __init__(self, folder: Path, *, overlap: bool) -> None:
        self.folder = folder
        self.digests: dict[int, str] = {}
        self.events: list[Event] = []
        self.spec = TrainSpec(
            entrypoint="test:train",
            run="hunt",
            config=CheckpointConfig(
                store=StoreConfig(url=str(folder / "store")),
                schedule=ScheduleConfig(every_steps=1),
                save=SaveConfig(overlap=overlap),
            ),
            invocation="flow-run-1",
        )

    def run(self, between: Callable[[nn.Module], None] = lambda model: None) -> None:
        attempt_folder = AttemptFolder(self.folder / "attempt")
        attempt_folder.path.mkdir()

        def train(run: TrainingRun) -> None:
            self._train(run, between)

        assert AttemptRunner(self.spec, self.events.append, attempt_folder).execute(train).done

    def _train(self, run: TrainingRun, between: Callable[[nn.Module], None]) -> None:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
        )
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        tracked = dict(zip(NAMES, (model, ema, optimizer, scheduler, scaler), strict=True))
        run.track(**tracked)
        committed: set[str | None] = {None}
        while len(committed) <= SAVES:
            between(model)
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.9, 0.9)
            ema.update_parameters(model)
            self.digests[run.step + 1] = digest({n: t.state_dict() for n, t in tracked.items()})
            run.step_done()
            committed.add(run.checkpoint)

    def check(self) -> None:
        """Compare every checkpoint with what the state was then."""
        with open_store(self.spec.config.store) as store:
            checkpoints = view_run(store, self.spec.run).checkpoints
        for checkpoint in checkpoints:
            assert checkpoint.record is not None
            uri = f"{self.spec.config.store.url}/hunt/commits/{checkpoint.id}.json"
            values = dict(load_uri(uri, NAMES))
            values["optimizer"].pop("param_shapes")
            assert digest(values) == self.digests[checkpoint.record.position.step], checkpoint.id
        assert len(checkpoints) >= SAVES


def digest(values: dict[str, Any]) -> str:
    """Of every tensor's bytes and every other value."""
    found = hashlib.sha256()
    for part in _parts(values):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


@pytest.mark.parametrize("overlap", [False, True], ids=["at the boundary", "overlapped"])
def test_every_checkpoint_is_of_one_moment(tmp_path: Path, overlap: bool) -> None:
    """Clipped gradients and weights, averaged weights, a fused optimizer, buffers, a scaler."""
    training = Training(tmp_path, overlap=overlap)
    training.run()
    assert [event for event in training.events if isinstance(event, SaveFailed)] == []
    training.check()


def test_weights_changed_outside_of_a_step_are_found_out(tmp_path: Path) -> None:
    """The torn save is told and repeated without overlap; all later ones are of one moment."""

    def between(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)

    training = Training(tmp_path, overlap=True)
    training.run(between)
    (failed,) = [event for event in training.events if isinstance(event, SaveFailed)]
    assert "changed outside of an optimizer's step" in failed.why
    assert "save.overlap" in failed.why
    training.check()


def test_saves_take_the_states_memory_once(tmp_path: Path) -> None:
    """Over a hundred saves: one arena, as large as the state, and nothing that grows, in the
    trainer or in the writer.
    """
    before = _mapped("ckpt-tasks-arena")  # of other tests in this process
    arenas: list[int] = []
    resident: list[int] = []
    of_writer: list[int] = []

    def train(run: TrainingRun) -> None:
        model = nn.Linear(1500, 1500)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run.track(model=model, optimizer=optimizer)
        for _step in range(100):
            model(torch.ones(1, 1500)).sum().backward()
            optimizer.step()
            run.step_done()
            run.report()  # waits for the save
            arenas.append(_mapped("ckpt-tasks-arena") - before)
            resident.append(_resident())
            of_writer.append(anonymous_bytes(writer_of(psutil.Process()).pid))

    training = Training(tmp_path, overlap=False)
    folder = AttemptFolder(tmp_path / "attempt")
    folder.path.mkdir()
    assert AttemptRunner(training.spec, training.events.append, folder).execute(train).done
    state = 2 * 4 * 1500 * 1501
    assert state <= max(arenas) < 1.1 * state
    assert max(resident[50:]) - max(resident[:50]) < state  # a leak would be of many
    assert max(of_writer[50:]) - max(of_writer[:50]) < 2_000_000  # bytes, of 50 saves


def _mapped(name: str) -> int:
    """Bytes of this process's mappings of a file in memory."""
    spans = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines()
        if name in line
    ]
    return sum(int(stop, 16) - int(start, 16) for start, stop in spans)


def _resident() -> int:
    """Bytes of this process in memory, shared ones too."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmRSS")
