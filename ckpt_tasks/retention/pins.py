"""Pins: what a person wants kept is kept, whatever the rules say.

A pin and a collection may come at the same moment. Each writes its own mark first, and then looks
for the other's, so that at least one of them sees the other and gives way.
"""

from __future__ import annotations

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["pin", "unpin"]


def pin(store: Store, layout: RunLayout, checkpoint: CheckpointId, *, why: str, by: str) -> None:
    """Keep a checkpoint until it is unpinned; one that has expired is an ordinary one again.

    Raises
    ------
    CheckpointNotFoundError
        There is no such checkpoint, or it is being collected: too late.
    ConfigError
        The run is a replica, which has the pins of its original.
    StoreError
        Storage failed: whether it is pinned is not known.
    """
    check_not_replica(store, read_run(store, layout))
    _check_there(store, layout, checkpoint)
    stood = store.exists(layout.mark("pins", checkpoint))
    mark(store, layout, "pins", checkpoint, why=why, by=by)
    try:
        if store.exists(layout.mark("collecting", checkpoint)):
            raise CheckpointNotFoundError(
                f"{checkpoint} of run {layout.run!r} is being collected, and cannot be pinned any "
                "more"
            )
        _check_there(store, layout, checkpoint)
    except CheckpointNotFoundError:
        if not stood:
            store.delete(layout.mark("pins", checkpoint))
        raise
    store.delete(layout.mark("expired", checkpoint))


def unpin(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> bool:
    """Leave a checkpoint to the rules again; returns whether it was pinned.

    Should it go, it does so after a whole grace from now: the mark of an earlier expiry is removed.
    Raises `ConfigError` for a replica.
    """
    check_not_replica(store, read_run(store, layout))
    pinned = store.exists(layout.mark("pins", checkpoint))
    store.delete(layout.mark("expired", checkpoint))
    store.delete(layout.mark("pins", checkpoint))
    return pinned


def _check_there(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> None:
    if not store.exists(layout.commit(checkpoint)):
        raise CheckpointNotFoundError(
            f"run {layout.run!r} has no checkpoint {checkpoint}; `ckpt-tasks ls` lists them"
        )
