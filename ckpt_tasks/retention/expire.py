"""Expiry: marks say that a checkpoint is no longer kept. No byte goes before `collect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.config import RetentionConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.retention.holds import what_is_held
from ckpt_tasks.retention.plan import RetentionPlan, always_kept, plan
from ckpt_tasks.retention.references import files_of, files_of_each
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["expire", "expire_checkpoint", "plan_run"]


def plan_run(
    store: Store,
    run: str,
    config: RetentionConfig,
    *,
    registry: Registry | None = None,
    now: datetime | None = None,
) -> RetentionPlan:
    """What retention would do with a run, and why; nothing is changed.

    Parameters
    ----------
    registry
        With the run bound; ``None`` where the run is in none.
    now
        Default: the time of this machine.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        It is a replica.
    CorruptCheckpointError
        With `RetentionConfig.max_bytes`: the index of a checkpoint cannot be read.
    RegistryError
        What the registry holds is not known: it did not answer, or none is given for a run that
        is registered.
    StoreError
        Storage failed.
    """
    layout = RunLayout(run)
    check_not_replica(store, read_run(store, layout))
    held = {} if config.keeps_everything else what_is_held(store, layout, registry)
    return _plan(store, view_run(store, run), config, held, now)


def expire(
    store: Store,
    run: str,
    config: RetentionConfig,
    *,
    by: str,
    registry: Registry | None = None,
    fence: Fence | None = None,
    now: datetime | None = None,
) -> RetentionPlan:
    """Mark what is no longer kept, and return the plan that was carried out.

    Parameters
    ----------
    by
        Who does so, for people.
    fence
        Of the attempt in whose name it is done, if of any.

    Raises
    ------
    StaleAttemptError
        A later attempt owns the run: this one marks nothing.

    Others as `plan_run`.
    """
    planned = plan_run(store, run, config, registry=registry, now=now)
    layout = RunLayout(run)
    if fence is not None and planned.to_expire:
        fence.check()
    for verdict in planned.to_expire:
        checkpoint = CheckpointId.parse(verdict.checkpoint)
        mark(store, layout, "expired", checkpoint, why=verdict.why[0], by=by)
    return planned


def expire_checkpoint(
    store: Store,
    run: str,
    checkpoint: str,
    *,
    by: str,
    registry: Registry | None = None,
) -> None:
    """Mark one checkpoint as no longer kept, because a person says so.

    Raises
    ------
    ConfigError
        It is pinned, held by the registry, or what a retry would start from; or of a replica.
    CheckpointNotFoundError
        There is no such run or checkpoint.
    RegistryError, StoreError
        As `plan_run`.
    """
    layout = RunLayout(run)
    check_not_replica(store, read_run(store, layout))
    held = what_is_held(store, layout, registry)
    view = view_run(store, run)
    if checkpoint not in {one.id for one in view.checkpoints}:
        raise CheckpointNotFoundError(f"run {run!r} has no checkpoint {checkpoint}")
    reasons = always_kept(view, held).get(checkpoint)
    if reasons:
        raise ConfigError(f"{checkpoint} of run {run!r} stays: {'; '.join(reasons)}")
    why = "a person asked for it"
    mark(store, layout, "expired", CheckpointId.parse(checkpoint), why=why, by=by)


def _plan(
    store: Store,
    view: RunView,
    config: RetentionConfig,
    held: Mapping[str, Sequence[str]],
    now: datetime | None,
) -> RetentionPlan:
    files = None
    if config.max_bytes is not None:
        records = (c.record for c in view.checkpoints if c.standing == "valid")
        layout = RunLayout(view.run.run)
        files = files_of_each(
            (record for record in records if record is not None),
            lambda record: files_of(store, layout, record),
        )
    return plan(view, config, now=now or datetime.now(UTC), held=held, files=files)
