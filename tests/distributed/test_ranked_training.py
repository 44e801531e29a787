"""Training on many ranks that dies and goes on, on another number of them."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_runs import HookedStore, claim_request
from support.run_checks import leftovers_of
from support.sharded_runs import LAYOUT, full_states, made, same
from support.worlds import run_world
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from ckpt_tasks import ResumableDistributedSampler, TrainingRun
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import Drain, InlineDrain
from ckpt_tasks.checkpointer.failures import failure_of, tell_failure
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.checkpointer.writer_client import ProcessDrain
from ckpt_tasks.checkpointer.writer_process import WriterSpec
from ckpt_tasks.config import ScheduleConfig, StoreConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.events import CheckpointQuarantined, Event, SaveFailed, Warned
from ckpt_tasks.fencing.claim import claim_attempt, open_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.recovery.recover import Recovered, recover
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.testing.wrappers import Operation
from ckpt_tasks.training.load import load_uri
from ckpt_tasks.training.ranked_saver import Ranks
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.messages import connect_ranks
from ckpt_tasks.training.ranks.recovery import RankedRecovery
from ckpt_tasks.training.saver import TrainingStopped
from ckpt_tasks.types import CheckpointId

SAMPLES, BATCH, EPOCHS = 40, 2, 2
SCHEDULE = ScheduleConfig(every_steps=3, every_epochs=1)
DATA = TensorDataset(torch.arange(SAMPLES), torch.randn(SAMPLES, 6))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Attempt:
    """One rank of an attempt, put together as a launcher would."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        root: Path,
        port: int,
        failing: list[str],
        *,
        in_process: bool,
        overlap: bool = False,
        schedule: ScheduleConfig = SCHEDULE,
    ) -> None:
        self.events: list[Event] = []
        self.store: Store = open_store(str(root), for_writing=True)
        self.folder = root.parent / f"rank-{rank}"
        failures = self.folder / "failures"
        self.agreement = RankAgreement(
            connect_ranks("127.0.0.1", port, serve=rank == 0),
            rank,
            world_size,
            seconds=20,
            on_failure=partial(tell_failure, failures),
        )
        identity = open_run(self.store, LAYOUT, created_by="a test")
        self.recovered = self._recovered(identity)
        number = self.recovered.resumed.attempt
        ranks = Ranks(self.agreement, schedule)
        nonce = self.agreement.nonce()
        drain: Drain = InlineDrain(
            JobRunner(
                HookedStore(self.store, partial(fail_in, failing)),
                LAYOUT,
                Fence(self.store, LAYOUT, number),
                incremental=False,
                failure=partial(failure_of, failures),
            )
        )
        if in_process:
            self.folder.mkdir(exist_ok=True)
            spec = WriterSpec(
                run=LAYOUT.run,
                attempt=number,
                store=StoreConfig(url=str(root)),
                conditional_create=True,
                incremental=True,
                events=str(self.folder / "events"),
                failures=str(failures),
            )
            drain = ProcessDrain(spec, lambda pid: None)
        checkpointer = Checkpointer(
            drain,
            identity,
            number,
            self.recovered.lineage,
            hyperparameters={},
            environment={},
            unique=lambda: nonce,
            rank=rank,
            world_size=world_size,
            gather_seconds=20,
        )
        self.run = TrainingRun(
            name=LAYOUT.run,
            attempt=number,
            checkpointer=checkpointer,
            schedule=ranks.policy,
            start=self.recovered.checkpoint,
            ranks=ranks,
            overlap=overlap,
            on_event=self.events.append,
        )

    def _recovered(self, identity: Any) -> Recovered:
        recovery = RankedRecovery(self.store, LAYOUT, self.agreement, seconds=20)
        if self.agreement.rank:
            return recovery.follow()
        attempt = claim_attempt(self.store, LAYOUT, identity, claim_request())
        recovered = recover(
            self.store,
            LAYOUT,
            identity,
            attempt,
            load=recovery.load,
            on_event=self.events.append,
        )
        recovery.begin(recovered)
        return recovered


def fail_in(failing: list[str], operation: Operation, path: str) -> None:
    """The disk fails in the writes whose names are listed, once in each."""
    for write in failing:
        if operation == "write" and write in path:
            failing.remove(write)
            raise StoreError(f"disk full at {path}")


def training(
    rank: int,
    world_size: int,
    root: Path,
    port: int,
    kind: str,
    dies_at: int | None,
    how: str = "",
    failing: tuple[str, ...] = (),
    fails_on: int = 1,
    schedule: ScheduleConfig = SCHEDULE,
) -> dict[str, Any]:
    """What one rank saw and held, until the training ended, died or was stopped.

    Parameters
    ----------
    dies_at, how
        The step in which all ranks die, or one gets a signal. "writer": by processes of their own.
    failing, fails_on
        Writes that fail, and the rank.
    """
    attempt = Attempt(
        rank,
        world_size,
        root,
        port,
        list(failing) if rank == fails_on else [],
        in_process=how == "writer",
        schedule=schedule,
    )
    run = attempt.run
    signal.signal(signal.SIGTERM, lambda number, frame: run.request_stop("SIGTERM"))
    torch.manual_seed(rank)
    items = made(kind, world_size)
    loader = DataLoader(DATA, BATCH, sampler=ResumableDistributedSampler(DATA, seed=4))
    run.track(**items, loader=loader)
    told: dict[str, Any] = {
        "start": run.resumed_from,
        "began": full_states(items),
        "rng": torch.get_rng_state(),
        "seen": [],
        "stopped": False,
    }
    try:
        _train(run, items, loader, told, dies_at, how)
    except TrainingStopped:
        told["stopped"] = True
    told.update(
        step=run.step,
        checkpoint=run.checkpoint,
        ended=full_states(items),
        failed=[event for event in attempt.events if isinstance(event, SaveFailed)],
        warned=[event.message for event in attempt.events if isinstance(event, Warned)],
        quarantined=[
            event.checkpoint for event in attempt.events if isinstance(event, CheckpointQuarantined)
        ],
    )
    run.close()
    attempt.agreement.close()
    return told


def _train(
    run: TrainingRun, items: Any, loader: Any, told: Any, dies_at: int | None, how: str
) -> None:
    for epoch in run.epochs(EPOCHS):
        for numbers, x in run.steps(loader):
            if run.step == dies_at:
                if not how:
                    return
                if torch.distributed.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            told["seen"].append((run.step + 1, epoch, numbers.tolist()))
            items["optimizer"].zero_grad()
            items["model"](x).square().mean().backward()
            items["optimizer"].step()
    run.finish()


def samples(results: list[dict[str, Any]], up_to: int) -> Counter[tuple[int, int]]:
    """How often each sample was seen in each epoch, in steps up to the one that was resumed."""
    return Counter(
        (epoch, sample)
        for result in results
        for step, epoch, numbers in result["seen"]
        if step <= up_to
        for sample in numbers
    )


def step_of(checkpoint: str) -> int:
    return CheckpointId.parse(checkpoint).step


def test_each_sample_once_however_many_ranks_go_on(tmp_path: Path) -> None:
    """2 ranks die in the first epoch's midst, 3 in the second's, and 1 ends: FSDP2, then plain.

    Every attempt begins with the state that was saved; no sample of either epoch is seen twice
    or missed, but for those that fill up where what is left does not divide.
    """
    root = tmp_path / "store"
    first = run_world(2, training, tmp_path, root, free_port(), "fsdp", 8)
    second = run_world(3, training, tmp_path, root, free_port(), "fsdp", 14)
    third = run_world(1, training, tmp_path, root, free_port(), "plain", None)
    # 10 steps an epoch on 2 ranks; 4 + 7 on 3; the rest on 1.
    assert [step_of(result["start"]) for result in (*second, *third)] == [6, 6, 6, 12]
    assert same(second[0]["began"], second[2]["began"])
    assert not any(result["failed"] for result in (*first, *second, *third))
    times = samples(first, 6) + samples(second, 12) + samples(third, 1000)
    assert times.keys() == {(epoch, sample) for epoch in range(2) for sample in range(SAMPLES)}
    # 16 are left for 3 ranks: 2 are seen again at the end of the first epoch.
    assert sum(times.values()) == 2 * SAMPLES + 2
    with open_store(str(root)) as store:
        final = read_commit(store, LAYOUT, CheckpointId.parse(third[0]["checkpoint"]))
        assert (final.world_size, final.trigger) == (1, "final")
        assert read_commit(store, LAYOUT, CheckpointId(12, 2, 3)).world_size == 3


def test_a_state_is_what_was_saved(tmp_path: Path) -> None:
    """A signal on one rank stops all at one step; what is restored is what they ended with."""
    root = tmp_path / "store"
    stopped = run_world(3, training, tmp_path, root, free_port(), "ddp", 5, "signal")
    assert all(result["stopped"] for result in stopped)
    steps = {result["step"] for result in stopped}
    assert len(steps) == 1
    assert step_of(stopped[0]["checkpoint"]) == steps.pop() > 5
    restored = run_world(3, training, tmp_path, root, free_port(), "ddp", None)
    for before, after in zip(stopped, restored, strict=True):
        # BatchNorm's running means differ on the ranks, which see different samples.
        assert same(after["began"], before["ended"])
        assert after["seen"][0][0] == before["step"] + 1
    assert not same(stopped[0]["ended"], stopped[1]["ended"])
    assert restored[0]["step"] == 14  # 7 an epoch


def test_a_save_that_fails_on_one_rank(tmp_path: Path) -> None:
    """Nothing is committed of it, and training goes on; the last one is repeated by all ranks."""
    root = tmp_path / "store"
    # The end's number depends on whether a save at step 21 was agreed ahead, and dropped.
    failing = ("a0001-s0001", "a0001-s0008", "a0001-s0009")
    results = run_world(
        2, training, tmp_path, root, free_port(), "fsdp", None, "", failing, seconds=60
    )
    # Step 3; 6, 9, the epoch's end at 10, 12, 15, 18; the end, twice.
    with open_store(str(root)) as store:
        paths = [info.path for info in store.list_objects(LAYOUT.commits)]
    found = [LAYOUT.checkpoint_id(path) for path in paths]
    assert [(c.step, c.sequence) for c in found if c] == [
        (6, 2), (9, 3), (10, 4), (12, 5), (15, 6), (18, 7), (20, 10)
    ]  # fmt: skip
    first, *last = [event.checkpoint for event in results[0]["failed"]]
    assert first == "step-00000003-a1-s1"
    assert last
    assert all(checkpoint.startswith("step-00000020") for checkpoint in last)
    assert all("rank 1: disk full" in event.why for event in results[0]["failed"])
    assert [result["checkpoint"] for result in results] == ["step-00000020-a1-s10"] * 2


@pytest.mark.parametrize(
    ("every", "fails_on", "fails", "committed"),
    [(1, 1, "a0001-s0002", [(10, 1), (20, 3)]), (2, 0, "a0001-s0001", [(20, 2)])],
)
def test_a_last_save_that_fails_is_made_up_for(
    tmp_path: Path, every: int, fails_on: int, fails: str, committed: list[tuple[int, int]]
) -> None:
    """By all ranks, though no save of the end is asked for, and one has its part already; that is
    removed.
    """
    root = tmp_path / "store"
    schedule = ScheduleConfig(every_epochs=every, final=False)
    results = run_world(
        2,
        *(training, tmp_path, root, free_port(), "fsdp", None, "", (fails,), fails_on, schedule),
        seconds=60,
    )
    with open_store(str(root)) as store:
        paths = [info.path for info in store.list_objects(LAYOUT.commits)]
        assert leftovers_of(store, LAYOUT) == set()
    found = [LAYOUT.checkpoint_id(path) for path in paths]
    assert [(c.step, c.sequence) for c in found if c] == committed
    assert [len(result["failed"]) for result in results] == [1, int(fails_on == 1)]


def test_writers_of_their_own_processes(tmp_path: Path) -> None:
    """They gather and commit while training goes on, and refer to what earlier saves hold."""
    root = tmp_path / "store"
    results = run_world(3, training, tmp_path, root, free_port(), "ddp", None, "writer")
    assert not any(result["failed"] for result in results)
    assert step_of(results[0]["checkpoint"]) == results[0]["step"] == 14
    told = [(tmp_path / f"rank-{rank}" / "events").read_text() for rank in range(3)]
    assert results[0]["checkpoint"] in told[0].splitlines()[-1]
    assert told[1:] == ["", ""], "a commit was told twice"
    restored = run_world(3, training, tmp_path, root, free_port(), "ddp", 0)
    for before, after in zip(results, restored, strict=True):
        assert after["start"] == before["checkpoint"]
        assert same(after["began"], before["ended"])


def test_a_rank_that_finds_damage_saves_all_from_it(tmp_path: Path) -> None:
    """Only one of three reads the damaged file: all fall back to the checkpoint before."""
    root = tmp_path / "store"
    run_world(2, training, tmp_path, root, free_port(), "fsdp", 8)
    with open_store(str(root), for_writing=True) as store:
        record = read_commit(store, LAYOUT, CheckpointId(6, 1, 2))
        folder = LAYOUT.in_run(LAYOUT.write_folder_in_run(record.write_id))
        path = f"{folder}/{LAYOUT.tensors_name('optimizer', 1)}"
        content = store.read(path)
        store.put(path, content[:-1] + bytes([content[-1] ^ 1]))
    results = run_world(3, training, tmp_path, root, free_port(), "fsdp", 4)
    assert [step_of(result["start"]) for result in results] == [3, 3, 3]
    assert results[0]["quarantined"] == ["step-00000006-a1-s2"]


def overlapped(
    rank: int, world_size: int, root: Path, port: int, kind: str, meddles: int | None
) -> dict[str, Any]:
    """What the whole state was at each boundary, and the failures, of saves that overlap.

    Parameters
    ----------
    meddles
        A rank that writes to its weights between a boundary and the optimizer's step.
    """
    attempt = Attempt(rank, world_size, root, port, [], in_process=True, overlap=True)
    run, items = attempt.run, made_wide(kind, world_size)
    loader = DataLoader(DATA, BATCH, sampler=ResumableDistributedSampler(DATA, seed=4))
    run.track(**items, loader=loader)
    states = {}
    for _epoch in run.epochs(EPOCHS):
        for _numbers, x in run.steps(loader):
            if rank == meddles:
                with torch.no_grad():
                    for parameter in items["model"].parameters():
                        parameter.mul_(1.0)
            items["optimizer"].zero_grad()
            items["model"](x).square().mean().backward()
            items["optimizer"].step()
            states[run.step + 1] = full_states(items)
            run.report()  # the one in flight, so that each step that is due is saved
    run.finish()
    failed = [event.why for event in attempt.events if isinstance(event, SaveFailed)]
    run.close()
    attempt.agreement.close()
    return {"states": states, "failed": failed, "checkpoint": run.checkpoint}


def made_wide(kind: str, world_size: int) -> dict[str, Any]:
    """Large enough that a step comes before all is copied."""
    torch.manual_seed(7)
    module: Any = torch.nn.Sequential(torch.nn.Linear(6, 900), torch.nn.Linear(900, 900))
    if kind == "fsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    else:
        module = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=kind != "fsdp")
    return {"model": module, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("kind", "meddles"), [("ddp", None), ("fsdp", 1), ("ddp", 0), ("fsdp", None)]
)
def test_overlapped_saves_of_several_ranks_are_of_one_moment(
    kind: str, meddles: int | None, tmp_path: Path
) -> None:
    """What a rank writes, and what it compares with another's; whoever meddles is found out."""
    root = tmp_path / "store"
    results = run_world(2, overlapped, tmp_path, root, free_port(), kind, meddles)
    states = results[0]["states"]
    with open_store(str(root)) as store:
        paths = [info.path for info in store.list_objects(LAYOUT.commits)]
    steps = set()
    for path in paths:
        step = step_of(path.rpartition("/")[2].removesuffix(".json"))
        found = load_uri(f"file://{root}/{path}", ["model", "optimizer"])
        assert same(dict(found["model"]), states[step]["model"])
        for key in ("exp_avg", "exp_avg_sq"):
            for number, values in found["optimizer"]["state"].items():
                assert same(values[key], states[step]["optimizer"]["state"][str(number)][key])
        steps.add(step)
    assert {10, 20} <= steps  # the epochs' ends
    if meddles is None:
        assert {3, 6, 9, 12, 15, 18} <= steps
        assert not any(result["failed"] for result in results)
    else:
        assert results[meddles]["failed"]
        assert "changed outside of an optimizer's step" in results[0]["failed"][0]
