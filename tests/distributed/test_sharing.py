"""What ranks hold in common is written once; what only seems so is never mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sharded_runs import (
    LAYOUT,
    RankSaver,
    exchange,
    full_states,
    made,
    opened,
    restore,
    same,
    train,
    write_id,
)
from support.worlds import run_world

from ckpt_tasks.checkpointer.differing import differing
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import open_store
from ckpt_tasks.testing import FaultyStore
from ckpt_tasks.testing.wrappers import Fault
from ckpt_tasks.types import CheckpointId


def tensor_bytes(root: Path, checkpoint: CheckpointId, name: str) -> list[int]:
    """Bytes of an item's tensors that each rank wrote."""
    start = opened(root, checkpoint, 0, 1)
    return [
        sum(
            tensor.size
            for tensor in index.tensors
            if Path(index.files[tensor.file].path).name.startswith(f"{name}.")
        )
        for index in start.indexes
    ]


def save_often(rank: int, world_size: int, root: Path, kind: str) -> Any:
    """Three saves; how often ranks exchanged anything, and the last id."""
    exchanged = []

    def counted(message: bytes) -> list[bytes]:
        exchanged.append(len(message))
        return exchange(message)

    items, saver = made(kind, world_size), RankSaver(root, rank, world_size, counted)
    counts = []
    for first in range(3):
        train(items["model"], items["optimizer"], 1, first=first)
        checkpoint = saver.save(items)
        counts.append(len(exchanged))
        torch.distributed.barrier()
    own = sum(t.numel() * t.element_size() for t in items["model"].state_dict().values())
    return checkpoint, counts, own


@pytest.mark.parametrize("kind", ["ddp", "hsdp"])
def test_replicas_are_written_once_and_spread(kind: str, tmp_path: Path) -> None:
    """Together the ranks write each replicated tensor once, and each has its share.

    The plan is made at the first save and kept: from then on ranks exchange nothing.
    """
    results = run_world(4, save_often, tmp_path, tmp_path / "store", kind)
    checkpoint, counts, whole = results[0]
    assert counts == [1, 1, 1]
    written = tensor_bytes(tmp_path / "store", checkpoint, "model")
    if kind == "ddp":
        assert sum(written) == whole
    else:
        # The parts that FSDP2 has cut, together, and what it leaves whole: BatchNorm's buffers.
        assert sum(written) == 4 * (6 * 7 + 7 + 2 * 7 + 7 * 2 + 2) + 4 * (7 + 7) + 8
    assert all(tensor_bytes(tmp_path / "store", checkpoint, "optimizer"))


def save_unlike(rank: int, world_size: int, root: Path) -> Any:
    """Running means and a counter that differ; weights that are the same."""
    items = made("ddp", world_size)
    items["loop"] = {"seen": rank, "best": torch.tensor(0.5)}
    train(items["model"], items["optimizer"], 1)
    items["model"].module.norm.running_mean += rank
    checkpoint = RankSaver(root, rank, world_size).save(items)
    torch.distributed.barrier()
    return checkpoint, full_states({n: items[n] for n in ("model", "optimizer")}), items["loop"]


def restore_unlike(rank: int, world_size: int, root: Path, checkpoint: CheckpointId) -> Any:
    items = made("ddp", world_size)
    items["loop"] = {}
    start = restore(root, checkpoint, items, rank, world_size)
    states = full_states({name: items[name] for name in ("model", "optimizer")})
    return states, items["loop"], differing(start, list(items)) if start.is_resharded else []


def test_what_differs_is_kept_for_each_rank(tmp_path: Path) -> None:
    """In a DDP module, too: each rank gets back its own. Others get rank 0's, and that is told."""
    root = tmp_path / "store"
    saved = run_world(2, save_unlike, tmp_path, root)
    checkpoint = saved[0][0]
    assert not same(saved[0][1], saved[1][1])
    for own, restored in zip(
        saved, run_world(2, restore_unlike, tmp_path, root, checkpoint), strict=True
    ):
        assert same(restored[:2], own[1:])
    for states, loop, lost in run_world(3, restore_unlike, tmp_path, root, checkpoint):
        assert same((states, loop), saved[0][1:])
        assert lost == ["model.norm.running_mean", "loop.seen"]


def save_diverging(rank: int, world_size: int, root: Path) -> Any:
    """Replicas that come apart behind the ranks' back, after the plan was made."""
    items, saver = made("ddp", world_size), RankSaver(root, rank, world_size)
    train(items["model"], items["optimizer"], 1)
    first = saver.save(items)
    torch.distributed.barrier()
    with torch.no_grad():
        for parameter in items["model"].parameters():
            parameter += rank
    problem = ""
    try:
        saver.save(items)
    except StoreError as error:
        problem = str(error)
    torch.distributed.barrier()
    saver.planner.forget()  # as every rank does when a save has failed
    third = saver.save(items)
    torch.distributed.barrier()
    return first, problem, third, full_states(items)


def load_own(rank: int, world_size: int, root: Path, checkpoint: CheckpointId) -> Any:
    items = made("ddp", world_size)
    restore(root, checkpoint, items, rank, world_size)
    return full_states(items)


def test_replicas_that_come_apart_are_never_mixed(tmp_path: Path) -> None:
    """The save that finds it out commits nothing, the next one keeps the values of each rank."""
    root = tmp_path / "store"
    results = run_world(2, save_diverging, tmp_path, root)
    _, problem, third, _ = results[0]
    assert "values differ where one was to write for all" in problem
    with open_store(str(root)) as store:
        commits = [info.path for info in store.list_objects(LAYOUT.commits)]
    assert len(commits) == 2
    restored = run_world(2, load_own, tmp_path, root, third)
    assert not same(*restored)
    assert [same(state, own[3]) for state, own in zip(restored, results, strict=True)] == [True] * 2


def save_unanswered(rank: int, world_size: int, root: Path) -> Any:
    """An exchange that fails for one rank: the others know all, it knows nothing."""

    def lost(message: bytes) -> list[bytes] | None:
        messages = exchange(message)
        return None if rank == 1 else messages

    items, saver = made("ddp", world_size), RankSaver(root, rank, world_size, lost)
    train(items["model"], items["optimizer"], 1)
    checkpoint = saver.save(items)
    torch.distributed.barrier()
    return checkpoint, full_states(items)


def test_a_rank_without_an_answer_writes_all(tmp_path: Path) -> None:
    """The checkpoint is larger, and right."""
    root = tmp_path / "store"
    checkpoint, expected = run_world(3, save_unanswered, tmp_path, root)[0]
    for state in run_world(3, load_own, tmp_path, root, checkpoint):
        assert same(state, expected)


def save_failing(rank: int, world_size: int, root: Path) -> Any:
    """A second save in which rank 1's disk fails."""
    items, saver = made("fsdp", world_size), RankSaver(root, rank, world_size)
    train(items["model"], items["optimizer"], 1)
    first = saver.save(items)
    state = full_states(items)
    torch.distributed.barrier()
    if rank == 1:
        saver.store = FaultyStore(saver.store, [Fault(at=2)])
    train(items["model"], items["optimizer"], 1, first=1)
    problem = ""
    try:
        saver.save(items, seconds=1.0)
    except StoreError as error:
        problem = str(error)
    torch.distributed.barrier()
    return first, state, problem


def test_one_rank_fails_and_nothing_is_committed(tmp_path: Path) -> None:
    """Rank 0 commits nothing and names the rank; the checkpoint before is as good as it was."""
    root = tmp_path / "store"
    results = run_world(3, save_failing, tmp_path, root)
    first, expected, problem = results[0]
    assert "rank 1 is missing" in problem
    assert [bool(result[2]) for result in results] == [True, True, False]
    with open_store(str(root)) as store:
        assert [LAYOUT.checkpoint_id(i.path) for i in store.list_objects(LAYOUT.commits)] == [first]
        assert read_commit(store, LAYOUT, first).world_size == 3
        folder = LAYOUT.in_run(LAYOUT.write_folder_in_run(write_id(2)))
        assert not store.exists(f"{folder}/{LAYOUT.index_name(1)}")
    for state in run_world(2, load_own_sharded, tmp_path, root, first):
        assert same(state, expected)


def load_own_sharded(rank: int, world_size: int, root: Path, checkpoint: CheckpointId) -> Any:
    items = made("fsdp", world_size)
    restore(root, checkpoint, items, rank, world_size)
    return full_states(items)
