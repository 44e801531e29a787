"""Failures that repeat: when an older checkpoint is worth a try, and when nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Failure
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Ending", "RepeatedFailure", "find_repeated_failure", "repeated_failure"]

_REPEATS = 3
"""How often the same failure counts as chance."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """Where an attempt that trained started, how far it came, and what it ended with.

    Parameters
    ----------
    started_from
        ``None``: the beginning.
    committed_step
        Step of its furthest checkpoint; -1 where it committed none.
    failure
        ``None`` where it did not fail, or nothing is known of its end.
    """

    started_from: CheckpointId | None
    committed_step: int = -1
    failure: Failure | None = None


class RepeatedFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The newest attempt ended as attempts before it did.

    Parameters
    ----------
    times
        How many attempts ended so.
    gone_back
        An older checkpoint has been tried since, and did not help: nothing more will.
    """

    failure: Failure
    times: int
    gone_back: bool

    def __str__(self) -> str:
        return f"{self.times} attempts ended at step {self.failure.step} with {self.failure.kind}"


def repeated_failure(endings: Sequence[Ending]) -> RepeatedFailure | None:
    """What the newest of `endings` has in common with earlier ones; ``None`` if too little.

    Failures are the same if kind and step are. One of which nothing is known is like no other:
    a preempted or lost machine says nothing about the checkpoint. What an attempt between them
    ended with does not matter, unless it committed beyond that step: then the run got past it.

    Parameters
    ----------
    endings
        Of the attempts of one invocation that trained, oldest first.
    """
    failure = endings[-1].failure if endings else None
    if failure is None:
        return None
    passed = [i for i, ending in enumerate(endings) if ending.committed_step > failure.step]
    endings = endings[passed[-1] + 1 :] if passed else endings
    same = [i for i, ending in enumerate(endings) if ending.failure == failure]
    if len(same) < _REPEATS:
        return None
    newest = _age(endings[same[_REPEATS - 1]])
    return RepeatedFailure(
        failure=failure,
        times=len(same),
        gone_back=any(_age(ending) < newest for ending in endings[same[_REPEATS - 1] + 1 :]),
    )


def find_repeated_failure(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    committed: Sequence[CheckpointId],
    invocation: str | None,
) -> RepeatedFailure | None:
    """`repeated_failure` of the `attempts` of an invocation, as their last heartbeats tell.

    Whoever starts a new invocation has looked at the cause: it begins without a past.

    Parameters
    ----------
    attempts
        Those claimed before, ascending.
    committed
        All checkpoints of the run.
    """
    endings: list[Ending] = []
    for ending in _newest_first(store, layout, attempts, committed, invocation):
        endings.insert(0, ending)
        newest = endings[-1].failure
        if newest is None or ending.committed_step > newest.step:
            break  # what lies further back cannot matter, and costs a request each
    return repeated_failure(endings)


def _newest_first(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    committed: Sequence[CheckpointId],
    invocation: str | None,
) -> Iterator[Ending]:
    furthest: dict[int, int] = {}
    for checkpoint in committed:
        step = furthest.get(checkpoint.attempt, -1)
        furthest[checkpoint.attempt] = max(step, checkpoint.step)
    for attempt in reversed(attempts):
        if attempt.resumed is None:
            continue
        if attempt.claim is not None and attempt.claim.invocation != invocation:
            continue
        start = attempt.resumed.checkpoint
        beat = read_heartbeat(store, layout, attempt.number)
        yield Ending(
            started_from=CheckpointId.parse(start) if start is not None else None,
            committed_step=furthest.get(attempt.number, -1),
            failure=beat.failure if beat is not None else None,
        )


def _age(ending: Ending) -> tuple[int, int]:
    """Orders the checkpoints that were started from, the beginning first."""
    start = ending.started_from
    return (0, 0) if start is None else (start.attempt, start.sequence)
