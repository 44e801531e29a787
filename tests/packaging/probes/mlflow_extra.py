"""With MLflow alone, the registry makes a run in a local database and registers a checkpoint."""

from __future__ import annotations

import importlib.metadata
import time

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import CommitRecord, IndexRef, LineageEntry, now
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.types import MetricRow, Position

(entry_point,) = importlib.metadata.entry_points(group="ckpt_tasks.registries", name="mlflow")
registry = entry_point.load()(
    RegistryConfig(tracking_uri="sqlite:///mlflow.db", experiment="probe")
)
description = RunDescription(
    run="probe", uid="0" * 32, store_url="file:///store", hyperparameters={"lr": 0.1}
)
ids = registry.create_run(description)
assert registry.find_run(description) == ids
registry.open_run(ids, description)
registry.log_metrics([MetricRow(key="loss", value=0.5, step=1, time_ms=int(time.time() * 1e3))])
assert registry.high_water() == {"loss": 1}

record = CommitRecord(
    uid="0" * 32,
    id="step-00000001-a1-s1",
    write_id="a0001-s0001-0",
    position=Position(epoch=0, step=1),
    lineage=[LineageEntry(attempt=1, resumed_from=None)],
    hyperparameters={"lr": 0.1},
    metrics={"loss": 0.5},
    trigger="steps",
    reason="every step",
    timings={},
    environment={},
    world_size=1,
    size=1,
    indexes=[IndexRef(rank=0, path="data/a/rank0000.index.json", size=1, digest="0" * 64)],
    created_at=now(),
)
registration = registry.register(record, uri="file:///store/record", manifest=encode(record))
registry.set_alias("resume-probe", registration)
assert registry.registered() == {record.id: registration}
registry.end_run("finished")
registry.close()
