"""Adopting a replica: it becomes a run of its own, under a new uid, and trains on from there.

An adoption **takes the next attempt's number**, by conditional create, with a claim under the new
uid. That decides it: of several adoptions one wins, and a copy that brings the original's attempt
of that number fails, as an attempt does that has been overtaken. So the checkpoints that the run
has inherited are those of lower numbers, which is what ``run.json`` then says of its ancestor. That
file is replaced last, whole, by bytes that follow from the claim alone: killed before, the replica
is one still, and the next adoption completes this one.

Inherited records keep their uid: they are immutable, and an index or a digest that was told
elsewhere must go on to fit. `RunRecord.owns` is where a record of either uid is known for this
run's.
"""

from __future__ import annotations

import uuid

import msgspec

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.fencing.attempts import next_attempt, read_attempts
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    Ancestor,
    AttemptClaim,
    Heartbeat,
    Replica,
    RunRecord,
    now,
)
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store

__all__ = ["adopt"]


def adopt(store: Store, run: str) -> RunRecord:
    """Make a replica a run of its own; no change where it has been adopted already.

    Parameters
    ----------
    store
        Opened for writing.

    Returns
    -------
    RunRecord
        Its identity from now on.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run, or no checkpoint of it has been copied yet.
    ConfigError
        It is no replica, and never was one.
    StoreError
        Storage failed. It is a replica still, or adopted; repeated, it is adopted.
    """
    layout = RunLayout(run)
    identity = read_run(store, layout)
    if not identity.replica:
        if identity.ancestors:
            return identity
        raise ConfigError(f"run {run!r} in {store.url} is no replica; there is nothing to adopt")
    if not list_checkpoints(store, layout):
        raise CheckpointNotFoundError(
            f"no checkpoint of run {run!r} has been copied to {store.url} yet"
        )
    claim = _claim(store, layout, identity, identity.replica)
    # Nothing lives under this number: the first attempt to train need not wait for silence.
    beat = Heartbeat(attempt=claim.attempt, beat=1, at=claim.claimed_at, ended=True)
    store.put(layout.heartbeat(claim.attempt), encode(beat))
    adopted = _adopted(identity, claim)
    store.put(layout.run_record, encode(adopted))
    return adopted


def _claim(store: Store, layout: RunLayout, identity: RunRecord, replica: Replica) -> AttemptClaim:
    """The claim that adopts it: newly made, or one that stands."""
    while True:
        attempts = read_attempts(store, layout)
        claims = [attempt.claim for attempt in attempts if attempt.claim is not None]
        for claim in claims:
            if not identity.owns(claim.uid, claim.attempt):
                return claim
        number = next_attempt([attempt.number for attempt in attempts])
        claim = _new_claim(number, replica, claims[-1] if claims else None)
        if create_once(store, layout.attempt(number), encode(claim)):
            return claim


def _new_claim(number: int, replica: Replica, last: AttemptClaim | None) -> AttemptClaim:
    """A claim that never trains; it says of the training what the newest one before it says."""
    return AttemptClaim(
        uid=uuid.uuid4().hex,
        attempt=number,
        claim_id=uuid.uuid4().hex,
        invocation=f"adopted from {replica.source}"[:4000],
        # Nobody is to be ended for it: --takeover ends the process of the newest claim.
        process=msgspec.structs.replace(this_process(), pid=0, started=0),
        claimed_at=now(),
        entrypoint=last.entrypoint if last is not None else "",
        hyperparameters=last.hyperparameters if last is not None else {},
    )


def _adopted(identity: RunRecord, claim: AttemptClaim) -> RunRecord:
    """The same for whoever completes the adoption."""
    ancestor = Ancestor(uid=identity.uid, attempts=claim.attempt - 1)
    return msgspec.structs.replace(
        identity,
        uid=claim.uid,
        created_at=claim.claimed_at,
        ancestors=[*(identity.ancestors or []), ancestor],
        replica=msgspec.UNSET,
    )
