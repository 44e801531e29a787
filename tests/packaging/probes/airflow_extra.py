"""The package works beside Airflow: both are imported, and a store is browsed."""

from __future__ import annotations

import airflow

import ckpt_tasks
from ckpt_tasks.checkpointer.catalog import list_runs
from ckpt_tasks.store import open_store

assert airflow.__version__.startswith("3.")
assert ckpt_tasks.__version__
assert list_runs(open_store("store")) == []
