"""Claiming a run: its identity, who owns it, and the next attempt's number."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NoProgressError,
    ObjectNotFoundError,
    RunBusyError,
)
from ckpt_tasks.fencing.attempts import (
    MAX_RECORD_BYTES,
    AttemptView,
    next_attempt,
    read_attempts,
)
from ckpt_tasks.fencing.failures import find_repeated_failure
from ckpt_tasks.fencing.heartbeat import HeartbeatObserver
from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import MAX_COMMIT_BYTES, AttemptClaim, CommitRecord, RunRecord, now
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId, Scalar

__all__ = ["Attempt", "ClaimRequest", "claim_attempt", "open_run", "read_run"]


class ClaimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a process that wants to execute the run says of itself.

    Parameters
    ----------
    invocation
        The orchestrator's id for one triggered execution; its retries share it.
    takeover
        Take the run over even from a live attempt of another invocation.
    takeover_after
        Seconds without a heartbeat after which another invocation's attempt counts as dead.
    without_commit
        Attempts of this invocation in a row that may end without a new checkpoint that a retry
        could start from.
    """

    invocation: str
    entrypoint: str
    hyperparameters: Mapping[str, Scalar]
    resume: str = "auto"
    tags: Mapping[str, str] = {}
    takeover: bool = False
    takeover_after: float = 60.0
    without_commit: int = 5


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that this process has claimed, and those before it."""

    claim: AttemptClaim
    earlier: tuple[AttemptView, ...]

    @property
    def number(self) -> int:
        return self.claim.attempt


def read_run(store: Store, layout: RunLayout) -> RunRecord:
    """The run's identity.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        ``run.json`` is damaged. Only an adoption ever replaces it, and whole, so somebody changed
        it: no retry mends that.
    """
    try:
        data = store.read(layout.run_record, limit=MAX_RECORD_BYTES)
    except ObjectNotFoundError as error:
        raise CheckpointNotFoundError(f"no run {layout.run!r} in {store.url}") from error
    try:
        record = decode(data, RunRecord, path=f"{store.url}/{layout.run_record}")
    except CorruptCheckpointError as error:
        raise ConfigError(
            f"run {layout.run!r} cannot be identified: {error}. Its checkpoints are untouched; "
            "restore run.json from a copy, or use another run name"
        ) from error
    if record.run != layout.run:
        raise ConfigError(
            f"{store.url}/{layout.run_record} belongs to run {record.run!r}, not "
            f"{layout.run!r}; was the folder renamed?"
        )
    return record


def open_run(store: Store, layout: RunLayout, *, created_by: str) -> RunRecord:
    """The run's identity, made if this is its first attempt. Errors as `read_run`."""
    try:
        return read_run(store, layout)
    except CheckpointNotFoundError:
        record = RunRecord(
            uid=uuid.uuid4().hex, run=layout.run, created_at=now(), created_by=created_by
        )
    created = create_once(store, layout.run_record, encode(record))
    return record if created else read_run(store, layout)


def claim_attempt(
    store: Store,
    layout: RunLayout,
    run: RunRecord,
    request: ClaimRequest,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Attempt:
    """Take the next attempt's number by conditional create.

    From this moment every earlier attempt is fenced off. Nothing has been chosen yet:
    choosing before claiming loses what an earlier attempt commits in between.

    Raises
    ------
    ConfigError
        It is a replica; or claims have been removed or added by hand.
    RunBusyError
        Another invocation's attempt is alive.
    NoProgressError
        Too many attempts of this invocation in a row ended without progress, or in the same
        way, also from an older checkpoint.
    """
    check_not_replica(store, run)
    while True:
        attempts = read_attempts(store, layout)
        _check_dense(store, layout, [a.number for a in attempts])
        _check_progress(store, layout, attempts, request)
        if attempts:
            _check_owner(store, layout, attempts[-1], request, sleep=sleep, clock=clock)
        claim = _claim(next_attempt([a.number for a in attempts]), run, request)
        if create_once(store, layout.attempt(claim.attempt), encode(claim)):
            if attempts:
                _end_owner(attempts[-1], request)
            # Read again: an earlier attempt may have resumed since, and its lineage counts.
            earlier = read_attempts(store, layout, before=claim.attempt)
            return Attempt(claim=claim, earlier=tuple(earlier))


def _claim(number: int, run: RunRecord, request: ClaimRequest) -> AttemptClaim:
    return AttemptClaim(
        uid=run.uid,
        attempt=number,
        claim_id=uuid.uuid4().hex,
        invocation=request.invocation,
        process=this_process(),
        claimed_at=now(),
        entrypoint=request.entrypoint,
        hyperparameters=dict(request.hyperparameters),
        resume=request.resume,
        tags=dict(request.tags),
    )


def _may_end(owner: AttemptView, request: ClaimRequest) -> bool:
    """Whether the owner is replaced even if it lives."""
    claim = owner.claim
    return claim is not None and (claim.invocation == request.invocation or request.takeover)


def _end_owner(owner: AttemptView, request: ClaimRequest) -> None:
    """End the process that has been replaced. Whoever looks into its death finds the claim."""
    claim = owner.claim
    if claim is not None and claim.process != this_process() and _may_end(owner, request):
        end_process(claim.process)


def _check_owner(
    store: Store,
    layout: RunLayout,
    owner: AttemptView,
    request: ClaimRequest,
    *,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Make sure that the owner may be replaced, or raise `RunBusyError`."""
    claim = owner.claim
    if claim is not None and claim.process == this_process():
        return  # This very process claims once more, as a loop over attempts or a notebook does.
    if _may_end(owner, request):
        return
    if claim is not None and process_is_alive(claim.process) is False:
        return
    observer = HeartbeatObserver(store, layout, owner.number, sleep=sleep, clock=clock)
    if not observer.is_silent(request.takeover_after):
        who = (
            f"of invocation {claim.invocation!r} (process {claim.process.pid} on "
            f"{claim.process.host}, since {claim.claimed_at})"
            if claim is not None
            else "(its claim is unreadable)"
        )
        raise RunBusyError(
            f"run {layout.run!r} is being trained by attempt {owner.number} {who}; wait for "
            "it, use another run name, or take it over with --takeover"
        )


def _check_dense(store: Store, layout: RunLayout, numbers: Sequence[int]) -> None:
    """The fence asks for one number more than its own, so a gap would let two attempts pass."""
    missing = sorted(set(range(1, len(numbers) + 1)) - set(numbers))
    if missing:
        raise ConfigError(
            f"the attempts of run {layout.run!r} in {store.url} are not numbered without a gap: "
            f"{missing[:5]} of {max(numbers)} are missing; somebody removed or added claims. "
            "Restore them, or use another run name"
        )


def _check_progress(
    store: Store, layout: RunLayout, attempts: Sequence[AttemptView], request: ClaimRequest
) -> None:
    """Refuse to loop for ever: the cap counts attempts that a retry gains nothing from."""
    if not attempts:
        return
    found = (layout.checkpoint_id(info.path) for info in store.list_objects(layout.commits))
    commits = [checkpoint for checkpoint in found if checkpoint is not None]
    repeated = find_repeated_failure(store, layout, attempts, commits, request.invocation)
    if repeated is not None and repeated.gone_back:
        raise _no_progress(layout, f"{repeated}, also from an older checkpoint")
    idle = _count_idle(store, layout, attempts, commits, request.invocation)
    if idle >= request.without_commit:
        raise _no_progress(
            layout,
            f"the last {idle} attempts ended without a new checkpoint that a retry could start "
            "from",
        )


def _count_idle(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    commits: Sequence[CheckpointId],
    invocation: str,
) -> int:
    """How many of this invocation's attempts since the last progress there are."""
    committed: dict[int, list[CheckpointId]] = {}
    for checkpoint in commits:
        committed.setdefault(checkpoint.attempt, []).append(checkpoint)
    idle = 0
    for attempt in reversed(attempts):
        mine = attempt.claim is None or attempt.claim.invocation == invocation
        own = committed.get(attempt.number, [])
        if not mine or any(_is_healthy(store, layout, checkpoint) for checkpoint in own):
            break
        idle += 1
    return idle


def _no_progress(layout: RunLayout, why: str) -> NoProgressError:
    return NoProgressError(
        f"run {layout.run!r}: {why}; not trying again. Look at the logs of its attempts, mend the "
        "cause, and start a new invocation"
    )


def _is_healthy(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> bool:
    """Whether a retry could go on from it; training that turned into NaN is no progress."""
    path = layout.commit(checkpoint)
    try:
        record = decode(store.read(path, limit=MAX_COMMIT_BYTES), CommitRecord, path=path)
    except (CorruptCheckpointError, ObjectNotFoundError):
        return False
    return not record.nonfinite
