"""Runs, checkpoints and rows as examples for tests of a registry."""

from __future__ import annotations

import uuid
from typing import Any

from ckpt_tasks.format.records import CommitRecord, IndexRef, LineageEntry
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.types import CheckpointId, MetricRow, Position

__all__ = ["example_description", "example_record", "rows_of"]

_START_MS = 1_700_000_000_000


def example_description(**changes: Any) -> RunDescription:
    """A run's description with a fresh uid, `changes` applied."""
    uid = uuid.uuid4().hex
    values: dict[str, Any] = {
        "run": f"run {uid[:6]}",
        "uid": uid,
        "store_url": "s3://bucket/checkpoints",
        "hyperparameters": {"lr": 0.001, "epochs": 20, "optimizer.name": "adamw"},
        "entrypoint": "toy.training:train",
        "tags": {"prefect.flow_run_id": "0b2d4a0e-1111-2222-3333-444455556666"},
    }
    return RunDescription(**{**values, **changes})


def example_record(description: RunDescription, step: int, **changes: Any) -> CommitRecord:
    """The commit record of a checkpoint of `description`'s run, `changes` applied."""
    values: dict[str, Any] = {
        "uid": description.uid,
        "id": str(CheckpointId(step=step, attempt=1, sequence=1)),
        "write_id": "w1",
        "position": Position(epoch=step // 100, step=step),
        "lineage": [LineageEntry(attempt=1, resumed_from=None)],
        "hyperparameters": dict(description.hyperparameters),
        "metrics": {},
        "trigger": "steps",
        "reason": "every 100 steps",
        "timings": {"capture": 0.1, "write": 0.2},
        "environment": {"torch": "2.13.0"},
        "world_size": 1,
        "size": 3_412_345,
        "indexes": [IndexRef(rank=0, path="data/w1/rank0000.index.json", size=1, digest="0" * 64)],
        "created_at": "2026-11-21T10:05:03.123Z",
    }
    return CommitRecord(**{**values, **changes})


def rows_of(key: str, values: list[float], *, first_step: int = 1) -> list[MetricRow]:
    """One row per value, on consecutive steps."""
    return [
        MetricRow(key, value, step, _START_MS + step)
        for step, value in enumerate(values, first_step)
    ]
