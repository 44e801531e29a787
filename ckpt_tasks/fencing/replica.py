"""Replicas: read-only copies of a run, which nothing but a later copy adds to."""

from __future__ import annotations

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.records import RunRecord
from ckpt_tasks.store.base import Store

__all__ = ["check_not_replica", "replica_text"]


def check_not_replica(store: Store, run: RunRecord) -> None:
    """Raise `ConfigError` where a run must not be changed, as it is a replica.

    Its original may go on elsewhere. Two runs of one identity would be one for the registry, and
    a copy under way counts on what lies here already.
    """
    if run.replica:
        raise ConfigError(
            f"run {run.run!r} in {store.url} is {replica_text(run)}. `ckpt-tasks adopt {run.run}` "
            "makes it a run of its own, which can be trained and tidied"
        )


def replica_text(run: RunRecord) -> str:
    """What a replica is, for people; empty for what is none."""
    if not run.replica:
        return ""
    return f"a read-only replica of the one in {run.replica.source}, since {run.replica.since}"
