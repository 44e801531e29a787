"""Step 4: prove that the newest checkpoint of a run is whole."""

from __future__ import annotations

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.verify import VerifyReport, verify_checkpoint
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_tasks.store import open_store

__all__ = ["verify"]


def verify(store: StoreConfig, run: str) -> VerifyReport:
    """Read every byte of the newest valid checkpoint and check it.

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
        newest = view_run(opened, run).newest
        if newest is None:
            raise CheckpointNotFoundError(
                f"run {run!r} has no valid checkpoint to verify; `ckpt-tasks ls` shows what it has"
            )
        report = verify_checkpoint(opened, run, newest.id)
    finally:
        opened.close()
    if not report.ok:
        raise CorruptCheckpointError(
            f"checkpoint {report.checkpoint} of run {run!r} is damaged: {report.problem}. "
            "A retry falls back to an older one"
        )
    return report
