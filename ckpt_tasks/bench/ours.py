"""Blocking saves and loads of one state by this package."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import torch

from ckpt_tasks.bench.measure import Contestant
from ckpt_tasks.bench.states import advance
from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.drain import Drain, InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import load_checkpoint
from ckpt_tasks.fencing.claim import ClaimRequest, claim_attempt
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import extend_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RunRecord, now
from ckpt_tasks.state.capture import capture, restore_values
from ckpt_tasks.state.tensors import tensor_from_buffer
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import Position, SaveDecision

__all__ = ["OURS", "Ours", "begin_run", "checkpointer_of", "new_run", "remove_run", "request"]

OURS = "ckpt-tasks"


class Ours:
    """Saves and loads as a training does: capture, digests, index, fence and commit included.

    Incremental saves are on, as they are by default; so the state is changed before each save.
    """

    def __init__(self, store: Store, items: Mapping[str, Any]) -> None:
        self._store = store
        self._items = items
        self._layout = new_run()
        runner = JobRunner(store, self._layout, Fence(store, self._layout, 1))
        self._checkpointer = checkpointer_of(InlineDrain(runner), self._layout)
        self._record: CommitRecord | None = None

    def contestants(self) -> tuple[Contestant, list[Contestant]]:
        """What saves, and what loads what was saved: all of it, and of the model alone."""
        return (
            Contestant(name=OURS, prepare=lambda number: self.renew(), run=self.save),
            [
                Contestant(name=OURS, run=lambda number: self._load(None)),
                Contestant(name=f"{OURS}, model only", run=lambda number: self._load(["model"])),
            ],
        )

    def renew(self) -> None:
        """Delete what was written, and change the whole state."""
        begin_run(self._store, self._layout)
        advance(image.data for image in capture(self._items).tensors)

    def save(self, number: int) -> CommitRecord:
        self._record = self._checkpointer.save(capture(self._items), request(number))
        return self._record

    def remove(self) -> None:
        """Delete what was written."""
        remove_run(self._store, self._layout)

    def close(self) -> None:
        self.remove()
        self._checkpointer.close()

    def _load(self, names: list[str] | None) -> object:
        assert self._record is not None
        loaded = load_checkpoint(self._store, self._layout, self._record, names=names)
        trees = {n: tree for n, tree in loaded.trees.items() if names is None or n in names}

        def tensor_at(position: int) -> torch.Tensor:
            entry = loaded.index.tensors[position]
            return tensor_from_buffer(loaded.tensors[position], entry.dtype, entry.shape)

        return restore_values(trees, tensor_at)


def new_run() -> RunLayout:
    """Where a run lies that nobody else has: others may measure the same store."""
    return RunLayout(f"ckpt-tasks-bench-{uuid.uuid4().hex[:8]}")


def checkpointer_of(drain: Drain, layout: RunLayout) -> Checkpointer:
    """Of the first attempt of a run."""
    lineage = extend_lineage(1, None)
    return Checkpointer(drain, _identity(layout), 1, lineage, hyperparameters={}, environment={})


def begin_run(store: Store, layout: RunLayout) -> None:
    """Delete everything that a run has written, and claim its first attempt anew."""
    remove_run(store, layout)
    asked = ClaimRequest(invocation="bench", entrypoint="bench", hyperparameters={})
    claim_attempt(store, layout, _identity(layout), asked)


def _identity(layout: RunLayout) -> RunRecord:
    return RunRecord(uid="0" * 32, run=layout.run, created_at=now(), created_by="bench")


def request(number: int) -> SaveRequest:
    return SaveRequest(position=Position(0, number), decision=SaveDecision("manual", "bench"))


def remove_run(store: Store, layout: RunLayout) -> None:
    """Delete everything that a run has written."""
    for info in store.list_objects(f"{layout.root}/"):
        store.delete(info.path)
