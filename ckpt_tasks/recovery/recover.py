"""Recovery: after the claim, choose, verify while loading, fall back, and say so.

The order is the protocol's: claim, list, choose, verify, then ``resumed.json``, then train. An
attempt that dies before it has written ``resumed.json`` never trained, and leaves the lineage
as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.checkpointer.reader import (
    LoadedCheckpoint,
    load_checkpoint,
    read_commit,
)
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_sharded
from ckpt_tasks.checkpointer.verify import check_checkpoint
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError, StaleAttemptError
from ckpt_tasks.events import CheckpointQuarantined, EventSink, discard_event
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.fencing.claim import Attempt
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import Lineage, extend_lineage
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, PassedOver, ResumedRecord, RunRecord, now
from ckpt_tasks.recovery.choose import Candidates, choose, nothing_restorable
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Recovered", "RecoveryPreview", "Start", "preview_recovery", "recover"]

T = TypeVar("T")

Start = LoadedCheckpoint | ShardedCheckpoint
"""What training starts from: of one rank, in host memory; of several, read as it is needed."""


class Recovered(msgspec.Struct, frozen=True):
    """Where an attempt starts: a verified checkpoint, or the beginning.

    `asked_for` tells that a person chose it, who may want to train a finished run further.
    """

    checkpoint: Start | None
    resumed: ResumedRecord
    lineage: Lineage
    asked_for: bool = False


class RecoveryPreview(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt that began now would start from. Read-only, and stale as soon as made."""

    run: str
    checkpoint: str | None
    step: int
    why: str
    passed_over: list[PassedOver]


def recover(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    attempt: Attempt,
    *,
    load: Callable[[CommitRecord], Start] | None = None,
    on_event: EventSink = discard_event,
) -> Recovered:
    """Choose, load and verify what `attempt` starts from, and record it.

    A damaged checkpoint is quarantined and reported, and the next older one is tried.

    Parameters
    ----------
    load
        Loads and verifies a checkpoint, or raises `CorruptCheckpointError`; default: as the only
        rank that does.

    Raises
    ------
    CheckpointNotFoundError
        Checkpoints were committed and none can be restored.
    CorruptCheckpointError
        The one that was asked for by id is damaged.
    StaleAttemptError
        A later attempt owns the run.
    StoreError
        Storage failed: nothing is quarantined for that.
    """
    claim = attempt.claim
    fence = Fence(store, layout, attempt.number)
    candidates = choose(
        store, layout, attempt.earlier, resume=claim.resume, invocation=claim.invocation
    )
    load = load or partial(_load_alone, store, layout)
    loaded, failed = _load_newest(store, layout, run, fence, candidates, load, on_event)
    if loaded is None and candidates.checkpoints:
        raise nothing_restorable(layout, [*candidates.passed_over, *failed])
    start = loaded.record if loaded else None
    passed = candidates.passed_over_for(start.id, failed) if start else []
    lineage = extend_lineage(attempt.number, start)
    resumed = ResumedRecord(
        attempt=attempt.number,
        checkpoint=start.id if start else None,
        lineage=list(lineage.entries),
        why=candidates.reason(passed),
        passed_over=passed[:100],
        resumed_at=now(),
    )
    fence.check()
    if not create_once(store, layout.resumed(attempt.number), encode(resumed)):
        raise StaleAttemptError(
            f"attempt {attempt.number} of run {layout.run!r} is executed by another process too; "
            "this one stops"
        )
    return Recovered(loaded, resumed, lineage, asked_for=candidates.asked_for)


def preview_recovery(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    attempts: Sequence[AttemptView],
    *,
    resume: str = "auto",
    invocation: str | None = None,
) -> RecoveryPreview:
    """What `recover` would find now, verified, without claiming or marking anything.

    Nothing is loaded: memory is bounded, however large the checkpoints are, and torch is not
    needed.

    Raises
    ------
    CheckpointNotFoundError
        Checkpoints were committed and none can be restored.
    StoreError
        Storage failed, which says nothing about the checkpoints.
    """

    def check(record: CommitRecord) -> CommitRecord:
        check_checkpoint(store, layout, record)
        return record

    candidates = choose(store, layout, attempts, resume=resume, invocation=invocation)
    failed: list[PassedOver] = []
    for checkpoint in candidates.checkpoints:
        try:
            record = _read_healthy(store, layout, run, checkpoint, candidates, check)
        except CorruptCheckpointError as error:
            record = PassedOver(checkpoint=str(checkpoint), why=str(error)[:4000])
        if isinstance(record, PassedOver):
            failed.append(record)
            continue
        passed = candidates.passed_over_for(record.id, failed)
        return RecoveryPreview(
            run=layout.run,
            checkpoint=record.id,
            step=record.position.step,
            why=candidates.reason(passed),
            passed_over=passed,
        )
    if candidates.checkpoints:
        raise nothing_restorable(layout, [*candidates.passed_over, *failed])
    return RecoveryPreview(
        run=layout.run, checkpoint=None, step=0, why=candidates.why, passed_over=[]
    )


def _load_alone(store: Store, layout: RunLayout, record: CommitRecord) -> Start:
    if record.world_size == 1:
        return load_checkpoint(store, layout, record)
    opened = open_sharded(store, layout, record)
    opened.preload()
    opened.verify_rest()
    return opened


def _load_newest(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    fence: Fence,
    candidates: Candidates,
    load: Callable[[CommitRecord], Start],
    on_event: EventSink,
) -> tuple[Start | None, list[PassedOver]]:
    passed: list[PassedOver] = []
    for checkpoint in candidates.checkpoints:
        try:
            loaded = _read_healthy(store, layout, run, checkpoint, candidates, load)
        except CorruptCheckpointError as error:
            why = str(error)[:4000]
            fence.check()  # what a stale attempt cannot read may have been removed since
            if _is_collected(store, layout, checkpoint):
                why = f"removed by a collection while it was read: {why}"
            else:
                by = f"attempt {fence.attempt}"
                mark(store, layout, "quarantined", checkpoint, why=why, by=by)
                on_event(CheckpointQuarantined(checkpoint=str(checkpoint), why=why))
            if candidates.asked_for:
                raise
            loaded = PassedOver(checkpoint=str(checkpoint), why=why)
        if not isinstance(loaded, PassedOver):
            return loaded, passed
        passed.append(loaded)
    return None, passed


def _is_collected(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> bool:
    """Whether a collection is removing it, or has: the record goes first, the mark last."""
    return store.exists(layout.mark("collecting", checkpoint)) or not store.exists(
        layout.commit(checkpoint)
    )


def _read_healthy(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    checkpoint: CheckpointId,
    candidates: Candidates,
    read: Callable[[CommitRecord], T],
) -> T | PassedOver:
    """`read` a checkpoint that is worth it; once more before damage is believed, as a transfer
    can fail too.
    """
    try:
        return _read_once(store, layout, run, checkpoint, candidates, read)
    except CorruptCheckpointError:
        return _read_once(store, layout, run, checkpoint, candidates, read)


def _read_once(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    checkpoint: CheckpointId,
    candidates: Candidates,
    read: Callable[[CommitRecord], T],
) -> T | PassedOver:
    try:
        record = read_commit(store, layout, checkpoint, run=run)
    except CheckpointNotFoundError as error:
        raise CorruptCheckpointError(f"{checkpoint} was listed and cannot be read") from error
    if record.nonfinite and not candidates.asked_for:
        names = ", ".join(record.nonfinite[:3])
        return PassedOver(checkpoint=record.id, why=f"unhealthy: NaN or infinity in {names}")
    return read(record)
