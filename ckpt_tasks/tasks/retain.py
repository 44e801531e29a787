"""Step 6: apply retention: what is no longer kept is marked, and after its grace removed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry import Registry
from ckpt_tasks.retention import CollectReport, RetentionPlan, plan_run
from ckpt_tasks.retention import collect as collect_run
from ckpt_tasks.retention import expire as expire_run
from ckpt_tasks.retention import expire_checkpoint as expire_one
from ckpt_tasks.retention import pin as pin_checkpoint
from ckpt_tasks.retention import unpin as unpin_checkpoint
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.tasks.registered import attached_registry
from ckpt_tasks.types import CheckpointId

__all__ = [
    "RetentionReport",
    "collect",
    "expire",
    "expire_checkpoint",
    "pin",
    "retain",
    "unpin",
]


class RetentionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What retention has marked and removed."""

    plan: RetentionPlan
    collected: CollectReport

    def __str__(self) -> str:
        kept, goes = len(self.plan.keeps), len(self.plan.goes)
        return f"{kept} checkpoints are kept, {goes} are not; {self.collected}"


def retain(config: CheckpointConfig, run: str, *, dry_run: bool = False) -> RetentionReport:
    """Expire what `RetentionConfig` does not keep, then collect what has expired long enough ago.

    Parameters
    ----------
    config
        Names the store, the rules, and the registry if there is one.
    dry_run
        Change nothing.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        It is a replica, which is read-only.
    RegistryError
        What the registry holds is not known, so that nothing was marked.
    StoreError
        Storage failed; worth repeating.
    """
    return RetentionReport(
        plan=expire(config, run, dry_run=dry_run), collected=collect(config, run, dry_run=dry_run)
    )


def expire(config: CheckpointConfig, run: str, *, dry_run: bool = False) -> RetentionPlan:
    """Mark what `RetentionConfig` does not keep; no byte goes. Arguments and errors as `retain`."""
    with _opened(config, run, for_writing=not dry_run) as (store, registry):
        if dry_run:
            return plan_run(store, run, config.retention, registry=registry)
        return expire_run(store, run, config.retention, by=_who(), registry=registry)


def expire_checkpoint(config: CheckpointConfig, run: str, checkpoint: str) -> None:
    """Mark one checkpoint, whatever the rules say.

    Raises
    ------
    ConfigError
        It is pinned, held by the registry, or what a retry would start from; or of a replica.

    Others as `retain`.
    """
    with _opened(config, run) as (store, registry):
        expire_one(store, run, checkpoint, by=_who(), registry=registry)


def collect(config: CheckpointConfig, run: str, *, dry_run: bool = False) -> CollectReport:
    """Remove what has expired long enough ago. Where it is not known what is needed, nothing is
    deleted and the report says why. Arguments and errors as `retain`.
    """
    with _opened(config, run, for_writing=not dry_run) as (store, registry):
        return collect_run(
            store,
            run,
            grace=config.retention.grace,
            by=_who(),
            registry=registry,
            dry_run=dry_run,
        )


def pin(config: CheckpointConfig, run: str, checkpoint: str, *, why: str) -> None:
    """Keep a checkpoint until it is unpinned.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run or checkpoint, or it is being collected.
    ConfigError
        `checkpoint` is no checkpoint's id, or one of a replica.
    """
    store = open_existing_store(config.store, for_writing=True)
    try:
        pin_checkpoint(store, RunLayout(run), _parsed(checkpoint), why=why, by=_who())
    finally:
        store.close()


def unpin(config: CheckpointConfig, run: str, checkpoint: str) -> bool:
    """Leave a checkpoint to the rules again; returns whether it was pinned."""
    store = open_existing_store(config.store, for_writing=True)
    try:
        return unpin_checkpoint(store, RunLayout(run), _parsed(checkpoint))
    finally:
        store.close()


@contextmanager
def _opened(
    config: CheckpointConfig, run: str, *, for_writing: bool = True
) -> Iterator[tuple[Store, Registry | None]]:
    store = open_existing_store(config.store, for_writing=for_writing)
    try:
        with attached_registry(config.registry, store, view_run(store, run)) as registry:
            yield store, registry
    finally:
        store.close()


def _parsed(checkpoint: str) -> CheckpointId:
    try:
        return CheckpointId.parse(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _who() -> str:
    return f"ckpt-tasks on {socket.gethostname()}"
