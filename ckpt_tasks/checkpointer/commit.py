"""The commit: a conditional create between two fence checks.

Order matters. Data first, then the fence, then the record, then the fence again: an attempt that
lost its run before the first check makes no record, and one that lost it afterwards, in between
even, never registers it. A record made in between is the next attempt's to use, or passed over by
all that follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from ckpt_tasks.checkpointer.references import Base, check_references
from ckpt_tasks.errors import ConfigError, StaleAttemptError, StoreError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import MAX_COMMIT_BYTES, CommitRecord, Index
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store

__all__ = ["commit", "new_write_id"]


def new_write_id(attempt: int, sequence: int, unique: str) -> str:
    """The name of one write: ``a0002-s0007-<unique>``; never used twice."""
    return f"a{attempt:04d}-s{sequence:04d}-{unique}"


def commit(
    store: Store,
    layout: RunLayout,
    fence: Fence,
    record: CommitRecord,
    indexes: Iterable[Index],
    *,
    base: Base | None = None,
) -> bytes:
    """Make the checkpoint exist.

    Parameters
    ----------
    record
        Names every index by digest; all of them are durable.
    indexes
        The same indexes, for the bytes of earlier writes that they refer to.
    base
        The checkpoint by way of which they do so (see `checkpointer.references`).

    Returns
    -------
    bytes
        The record as it stands in the store.

    Raises
    ------
    StaleAttemptError
        A later attempt owns the run. The record was not made, or is that attempt's to use or to
        pass over; either way this one must not register it.
    ConfigError
        The record is larger than any may be. Every later one would be, so training ends now
        rather than unprotected.
    StoreError
        Storage failed. Whether the record was made may be unknown, so its data must be kept.
    """
    data = encode(record)
    if len(data) > MAX_COMMIT_BYTES:
        raise ConfigError(
            f"the commit record of {record.id} takes {len(data)} bytes, more than "
            f"{MAX_COMMIT_BYTES}; log fewer or shorter hyperparameters and metrics"
        )
    fence.check()
    check_references(store, layout, record.write_id, indexes, base)
    if not create_once(store, layout.commit(record.checkpoint), data):
        raise StaleAttemptError(
            f"{record.id} of run {layout.run!r} was committed by another process that executes "
            f"the same attempt {fence.attempt}; this process stops"
        )
    # Unreachable now, the fence is asked again by the registrar, before it registers anything.
    with contextlib.suppress(StoreError):
        fence.check()
    return data
