"""Runs to copy, and what a copy of them must consist of."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from support.made_runs import MadeRun, memory_store
from support.retained_runs import RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import list_checkpoints, view_run
from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.retention.references import files_of
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId


def run_to_copy(store: Store | None = None) -> RetainedRun:
    """Two attempts whose checkpoints share bytes: valid ones, a zombie, an unhealthy one, one that
    is pinned, one that has expired and one that is quarantined.
    """
    run = RetainedRun(store)
    first = run.begin("flow-run-1")
    expired, pinned = first.save(10, state_of(1)), first.save(20, state_of(2))
    first.save(30, state_of(3))  # beyond what the second goes on from
    second = run.begin("flow-run-2", resume=str(pinned))
    second.save(30, state_of(3))
    second.save(40, state_of(4), nonfinite=["model.head"])
    quarantined = second.save(50, state_of(5, frozen=1))
    second.save(60, state_of(6, frozen=2))
    for kind, checkpoint in {
        "pins": pinned, "expired": expired, "quarantined": quarantined
    }.items():  # fmt: skip
        mark(run.store, run.layout, kind, checkpoint, why="a test", by="a test")  # type: ignore[arg-type]
    return run


def kept(run: MadeRun) -> list[CheckpointId]:
    """What a copy of all takes, oldest first."""
    views = view_run(run.store, run.name).checkpoints
    chosen = [c.id for c in views if c.standing in ("valid", "zombie", "unhealthy")]
    return [CheckpointId.parse(id_) for id_ in reversed(chosen)]


def closure(run: MadeRun, checkpoints: Iterable[CheckpointId], *, attempts: int) -> set[str]:
    """Every object that a copy of some checkpoints consists of, but for marks."""
    layout = run.layout
    paths = {layout.run_record}
    for number in range(1, attempts + 1):
        paths |= {layout.attempt(number), layout.resumed(number)}
    for checkpoint in checkpoints:
        record = run.record(checkpoint)
        paths |= {layout.commit(checkpoint), *files_of(run.store, layout, record)}
    return paths


def contents(store: Store) -> dict[str, bytes]:
    return {info.path: store.read(info.path) for info in store.list_objects("")}


def check_replica(run: MadeRun, target: Store) -> list[CheckpointId]:
    """Whatever lies there is the source's, and every checkpoint is whole; returns these."""
    for path, data in contents(target).items():
        assert path == run.layout.run_record or data == run.store.read(path), path
    return check_whole(target, run.name)


def check_whole(store: Store, run: str) -> list[CheckpointId]:
    """Every checkpoint that is there has all its bytes; returns them."""
    view = view_run(store, run)
    for checkpoint in view.checkpoints:
        assert verify_checkpoint(store, run, checkpoint.id).ok, checkpoint
        assert checkpoint.standing != "damaged", checkpoint
    return [CheckpointId.parse(c.id) for c in view.checkpoints]


def committed(store: Store, run: MadeRun) -> set[CheckpointId]:
    return set(list_checkpoints(store, run.layout))


def refused() -> pytest.RaisesExc[ConfigError]:
    """An error that says how a replica can be changed."""
    return pytest.raises(ConfigError, match=r"read-only replica of .*`ckpt-tasks adopt digits`")


__all__ = [
    "check_replica",
    "check_whole",
    "closure",
    "committed",
    "contents",
    "kept",
    "memory_store",
    "refused",
    "run_to_copy",
]
