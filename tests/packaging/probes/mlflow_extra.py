"""With MLflow alone, the registry makes a run in a local database and writes to it."""

from __future__ import annotations

import importlib.metadata
import time

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.types import MetricRow

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
registry.end_run("finished")
registry.close()
