"""Step 4: prove that the newest checkpoint of a run is whole."""

from __future__ import annotations

import socket

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.checkpointer.verify import VerifyReport, mark_verified, verify_checkpoint
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from ckpt_tasks.fencing.replica import replica_text
from ckpt_tasks.store import Store, open_store

__all__ = ["verify", "verify_and_mark"]


def verify(store: StoreConfig, run: str) -> VerifyReport:
    """Read every byte of the newest valid checkpoint and check it; mark it as `verify_and_mark`.

    Raises
    ------
    CheckpointNotFoundError
        No such run, or it has no valid checkpoint.
    CorruptCheckpointError
        The bytes are not those that were committed.
    StoreError
        Storage did not answer.
    """
    opened = open_store(store)
    try:
        view = view_run(opened, run)
        newest = view.newest
        if newest is None:
            raise CheckpointNotFoundError(
                f"run {run!r} has no valid checkpoint to verify; `ckpt-tasks ls` shows what it has"
            )
        report = verify_and_mark(opened, view, newest.id)
    finally:
        opened.close()
    if not report.ok:
        raise CorruptCheckpointError(
            f"checkpoint {report.checkpoint} of run {run!r} is damaged: {report.problem}. "
            "A retry falls back to an older one"
        )
    return report


def verify_and_mark(store: Store, view: RunView, checkpoint: str) -> VerifyReport:
    """`verify_checkpoint`; what is whole is marked, so that a collection need not read it again.

    A replica, and a store that takes no mark, are verified as well: the report says why there is
    none.
    """
    report = verify_checkpoint(store, view.run.run, checkpoint)
    if not report.ok:
        return report
    if view.run.replica:
        return msgspec.structs.replace(report, unmarked=f"it is of {replica_text(view.run)}")
    try:
        mark_verified(store, view.run.run, checkpoint, by=f"ckpt-tasks on {socket.gethostname()}")
    except StoreError as error:
        return msgspec.structs.replace(report, unmarked=str(error))
    return report
