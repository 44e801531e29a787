"""Copy a run to another store, where it is a replica; and make a replica a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.records import RunRecord
from ckpt_tasks.replica import CopyReport
from ckpt_tasks.replica import adopt as adopt_run
from ckpt_tasks.replica import copy as copy_run
from ckpt_tasks.store import open_existing_store, open_store
from ckpt_tasks.types import CheckpointId

__all__ = ["adopt", "copy"]


def copy(
    source: StoreConfig,
    target: StoreConfig,
    run: str,
    *,
    checkpoint: str | None = None,
    on_copied: Callable[[str, int], None] = lambda checkpoint, size: None,
) -> CopyReport:
    """Make a run's checkpoints exist in another store, every byte verified on the way.

    Parameters
    ----------
    checkpoint
        Id of the only one that is copied; default: all that are kept and not known to be damaged.
    on_copied
        Called with the id of each as soon as it exists there, and the bytes that this took.

    Returns
    -------
    CopyReport
        Also where some were damaged, or given up meanwhile: the others have been copied.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run or checkpoint.
    ConfigError
        The target is the same store, or has another run of that name.
    StaleAttemptError
        The replica has been adopted meanwhile.
    CorruptCheckpointError
        The checkpoint asked for is damaged.
    StoreError
        One of the stores failed. A repeated copy goes on from there.
    """
    only = _parsed(checkpoint) if checkpoint is not None else None
    with (
        closing(open_existing_store(source)) as opened,
        closing(open_store(target, for_writing=True)) as to,
    ):
        return copy_run(opened, to, run, checkpoint=only, on_copied=on_copied)


def adopt(store: StoreConfig, run: str) -> RunRecord:
    """Make a replica a run of its own, under a new uid; returns its identity.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run, or no checkpoint of it has been copied yet.
    ConfigError
        It is no replica.
    StoreError
        Storage failed; worth repeating.
    """
    with closing(open_existing_store(store, for_writing=True)) as opened:
        return adopt_run(opened, run)


def _parsed(checkpoint: str) -> CheckpointId:
    try:
        return CheckpointId.parse(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error
