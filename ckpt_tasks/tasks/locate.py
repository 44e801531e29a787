"""Where a checkpoint lies and what it is: what is told to whoever goes on with it."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.masking import mask_url
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.types import Number

__all__ = ["LocatedCheckpoint", "describe", "locate"]


class LocatedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A committed checkpoint.

    Parameters
    ----------
    uri, digest
        Of its commit record; userinfo masked. As registries tell them.
    epoch, step, size
        Where in the training it lies, and bytes of all its files.
    """

    run: str
    uid: str
    checkpoint: str
    uri: str
    digest: str
    epoch: int
    step: int
    size: int
    committed_at: str
    metrics: dict[str, Number]


def locate(store: StoreConfig, run: str, checkpoint: str | None = None) -> LocatedCheckpoint:
    """Find a checkpoint of a run; default: the newest valid one.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run or checkpoint, or the run has no valid one.
    StoreError
        Storage did not answer.
    """
    opened = open_store(store)
    try:
        view = view_run(opened, run)
        return describe(opened, view, _record(view, checkpoint))
    finally:
        opened.close()


def _record(view: RunView, checkpoint: str | None) -> CommitRecord:
    if checkpoint is None:
        found = view.newest
    else:
        found = next((c for c in view.checkpoints if c.id == checkpoint), None)
    if found is None or found.record is None:
        which = f"checkpoint {checkpoint}" if checkpoint else "valid checkpoint"
        raise CheckpointNotFoundError(
            f"run {view.run.run!r} has no {which}; `ckpt-tasks ls` shows what it has"
        )
    return found.record


def describe(store: Store, view: RunView, record: CommitRecord) -> LocatedCheckpoint:
    """What a commit record says, and where it lies. Raises `StoreError`."""
    path = RunLayout(view.run.run).commit(record.checkpoint)
    return LocatedCheckpoint(
        run=view.run.run,
        uid=view.run.uid,
        checkpoint=record.id,
        uri=f"{mask_url(store.url).rstrip('/')}/{path}",
        digest=digest(store.read(path, limit=MAX_RECORD_BYTES)),
        epoch=record.position.epoch,
        step=record.position.step,
        size=record.size,
        committed_at=record.created_at,
        metrics=record.metrics,
    )
