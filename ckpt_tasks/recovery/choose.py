"""Which checkpoints an attempt may start from, newest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import msgspec

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.marks import is_tombstoned, marked
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.fencing.failures import find_repeated_failure
from ckpt_tasks.fencing.lineage import Lineage, trace_lineage
from ckpt_tasks.format.layout import MarkKind, RunLayout
from ckpt_tasks.format.records import PassedOver
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Candidates", "choose", "nothing_restorable"]

_NEWEST = "the newest checkpoint of the run's lineage"
_NEWEST_USABLE = "the newest usable checkpoint of the run's lineage"


class Candidates(msgspec.Struct, frozen=True, kw_only=True):
    """What may be started from.

    Parameters
    ----------
    checkpoints
        To be tried in this order. Empty: start from the beginning.
    passed_over
        Those that are not tried, or only as a last resort, and why.
    why
        One sentence for people, true of the first of them; see `reason`.
    asked_for
        A person chose; who may want an unhealthy checkpoint.
    """

    checkpoints: tuple[CheckpointId, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    why: str
    asked_for: bool = False

    def passed_over_for(self, start: str, failed: Sequence[PassedOver]) -> list[PassedOver]:
        """What an attempt that starts from `start` passes over, newest first.

        `failed` were tried before it in vain.
        """
        newer = [p for p in self.passed_over if _age(p.checkpoint) > _age(start)]
        return sorted([*newer, *failed], key=lambda p: _age(p.checkpoint), reverse=True)

    def reason(self, passed_over: Sequence[PassedOver]) -> str:
        """Why an attempt starts where it does, given all that it passes over."""
        if not passed_over:
            return self.why
        return f"{_NEWEST_USABLE} ({len(passed_over)} passed over)"


def _age(checkpoint: str) -> tuple[int, int]:
    parsed = CheckpointId.parse(checkpoint)
    return parsed.attempt, parsed.sequence


def choose(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    *,
    resume: str = "auto",
    invocation: str | None = None,
) -> Candidates:
    """List and order what an attempt may start from. Call it after claiming, never before.

    Parameters
    ----------
    attempts
        Those claimed before this one.
    resume
        ``auto``: the newest on the lineage. ``fresh``: the beginning. Or a checkpoint's id.
        The latter two bind only the first attempt of an invocation that trains: an orchestrator
        hands every retry the same words.
    invocation
        This attempt's. Where its attempts fail again and again in the same way, the newest
        checkpoint is passed over, once.

    Raises
    ------
    CheckpointNotFoundError
        Checkpoints were committed on this lineage and none may be restored, or the one asked
        for does not exist. A run never starts again at step 0 silently.
    ConfigError
        `resume` is no checkpoint id.
    """
    lineage = trace_lineage(attempts)
    # Before the commits: a mark that is removed by now belongs to a record that is removed, too.
    marks = marked(store, layout)
    committed = list_checkpoints(store, layout)
    if resume != "auto" and not _has_trained(attempts, invocation):
        return _as_asked(layout, marks, committed, resume)
    return _newest(store, layout, attempts, lineage, marks, committed, invocation)


def _has_trained(attempts: Sequence[AttemptView], invocation: str | None) -> bool:
    return any(
        attempt.resumed is not None
        and attempt.claim is not None
        and attempt.claim.invocation == invocation
        for attempt in attempts
    )


def _as_asked(
    layout: RunLayout,
    marks: Mapping[MarkKind, Set[CheckpointId]],
    committed: Sequence[CheckpointId],
    resume: str,
) -> Candidates:
    if resume == "fresh":
        return Candidates(why="a fresh start was asked for", asked_for=True)
    try:
        wanted = CheckpointId.parse(resume)
    except ValueError as error:
        raise ConfigError(f"resume takes 'auto', 'fresh' or a checkpoint's id: {error}") from error
    if wanted not in committed:
        raise CheckpointNotFoundError(
            f"run {layout.run!r} has no checkpoint {wanted}; `ckpt-tasks ls` lists them"
        )
    if wanted in marks["collecting"]:
        # A collection that comes later finds the claim, which names what is asked for.
        raise CheckpointNotFoundError(
            f"{wanted} of run {layout.run!r} has expired, and is being collected"
        )
    return Candidates(checkpoints=(wanted,), why="this checkpoint was asked for", asked_for=True)


def _newest(
    store: Store,
    layout: RunLayout,
    attempts: Sequence[AttemptView],
    lineage: Lineage,
    marks: Mapping[MarkKind, Set[CheckpointId]],
    committed: Sequence[CheckpointId],
    invocation: str | None,
) -> Candidates:
    valid = lineage.valid(committed)
    damage = [text for attempt in attempts for text in attempt.damage]
    if not valid and committed and damage:
        raise CheckpointNotFoundError(
            f"run {layout.run!r} has {len(committed)} checkpoints, and which of them are its own "
            f"cannot be told: {damage[0]}. It is not started again from step 0 by itself: copy "
            "back what was damaged, or name a checkpoint with --resume"
        )
    start = lineage.entries[0].resumed_from if lineage.entries else None
    if not valid and start is not None:
        raise CheckpointNotFoundError(
            f"run {layout.run!r} went on from {start}, which is gone. It is not started again from "
            "step 0 by itself: name a checkpoint with --resume, or ask for it with --resume fresh"
        )
    if not valid:
        why = "no earlier attempt committed a checkpoint" if attempts else "the first attempt"
        return Candidates(why=why)
    passed = _marked(marks, valid)
    tried = [checkpoint for checkpoint in valid if checkpoint not in passed]
    expired = [checkpoint for checkpoint in passed if _is_whole(checkpoint, marks)]
    if not tried and not expired:
        raise nothing_restorable(layout, list(passed.values()))
    repeated = find_repeated_failure(store, layout, attempts, committed, invocation)
    if len(tried) > 1 and repeated is not None and not repeated.gone_back:
        deadly = tried.pop(0)
        tried.append(deadly)  # the last resort, should every older one turn out damaged
        passed[deadly] = PassedOver(checkpoint=str(deadly), why=str(repeated))
    tried += expired  # the very last resort: their bytes may still be there
    return Candidates(
        checkpoints=tuple(tried),
        passed_over=tuple(passed.values()),
        why=_NEWEST,
    )


def nothing_restorable(layout: RunLayout, passed: Sequence[PassedOver]) -> CheckpointNotFoundError:
    """The error for a run that has committed, and has nothing left to start from."""
    found = {p.checkpoint: p.why for p in passed}  # a last resort was tried although passed over
    reasons = "; ".join(f"{checkpoint}: {why}" for checkpoint, why in list(found.items())[:5])
    return CheckpointNotFoundError(
        f"none of the {len(found)} checkpoints of run {layout.run!r} can be restored ({reasons}). "
        "It is not started again from step 0 by itself: copy back what was damaged, or ask for "
        "it with --resume fresh"
    )


def _is_whole(checkpoint: CheckpointId, marks: Mapping[MarkKind, Set[CheckpointId]]) -> bool:
    return checkpoint not in marks["collecting"] and checkpoint not in marks["quarantined"]


def _marked(
    marks: Mapping[MarkKind, Set[CheckpointId]], valid: Sequence[CheckpointId]
) -> dict[CheckpointId, PassedOver]:
    """Those of `valid` that must not be used, and why."""
    reasons: dict[CheckpointId, str] = {}
    for checkpoint in valid:
        if checkpoint in marks["quarantined"]:
            reasons[checkpoint] = "quarantined: it was found damaged"
        elif is_tombstoned(checkpoint, marks):
            reasons[checkpoint] = "expired: it may be removed at any time"
    return {
        checkpoint: PassedOver(checkpoint=str(checkpoint), why=why)
        for checkpoint, why in reasons.items()
    }
