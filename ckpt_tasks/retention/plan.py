"""What is kept and what goes, and why: a plan as data, made from records alone.

A checkpoint is kept when any rule keeps it and no limit forbids it. Whatever the rules say, these
stay: the newest one that a retry would start from, what is pinned, and what the registry holds.
Only what a retry could start from is offered to the rules; of the rest (zombies, unhealthy and
quarantined ones) nothing goes that may still be somebody's newest work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime

import msgspec

from ckpt_tasks.checkpointer.catalog import CheckpointView, RunView, Standing
from ckpt_tasks.config import RetentionConfig
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.retention.rules import age_of, readable_duration, rules_of
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.types import CheckpointId

__all__ = ["Files", "RetentionPlan", "Verdict", "always_kept", "plan"]

Files = Mapping[str, int]
"""The files that a checkpoint needs, by path, with their bytes."""

_NEWEST = "the newest that a retry would start from"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one checkpoint.

    Parameters
    ----------
    why
        Every reason for which it is kept; or why it goes.
    size
        Bytes of all its files; ``None`` where its record cannot be read.
    """

    checkpoint: str
    keep: bool
    why: list[str]
    standing: Standing
    size: int | None


class RetentionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a run's checkpoints, newest first."""

    run: str
    verdicts: list[Verdict]

    @property
    def keeps(self) -> list[str]:
        return [verdict.checkpoint for verdict in self.verdicts if verdict.keep]

    @property
    def goes(self) -> list[str]:
        return [verdict.checkpoint for verdict in self.verdicts if not verdict.keep]

    @property
    def to_expire(self) -> list[Verdict]:
        """Those that go and are not marked yet."""
        return [v for v in self.verdicts if not v.keep and v.standing != "expired"]


def plan(
    view: RunView,
    config: RetentionConfig,
    *,
    now: datetime,
    held: Mapping[str, Sequence[str]],
    files: Mapping[str, Files] | None = None,
) -> RetentionPlan:
    """Decide about every checkpoint of a run.

    Parameters
    ----------
    view
        The run as its store tells it.
    now
        For rules that go by age.
    held
        What the registry needs, by checkpoint id, each with reasons (``alias 'best'``).
    files
        Of each checkpoint, for `RetentionConfig.max_bytes`. One that is missing counts in full.
    """
    always = always_kept(view, held)
    gone: dict[str, str] = {}
    unsure = _undecidable(view, config)
    if unsure is not None:
        all_left = (c.id for c in view.checkpoints if c.standing != "expired")
        kept = _merged(always, {checkpoint: [unsure] for checkpoint in all_left})
    else:
        kept = _merged(always, _by_rules(view, config, now))
        gone = _too_old(view, config, now, always)
        left = [c for c in view.checkpoints if c.id in kept and c.id not in gone]
        gone |= _too_large(left, config, always, files or {})
    return RetentionPlan(
        run=view.run.run,
        verdicts=[_verdict(c, kept.get(c.id), gone.get(c.id)) for c in view.checkpoints],
    )


def _merged(
    first: Mapping[str, list[str]], second: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    return {one: [*first.get(one, ()), *second.get(one, ())] for one in {**first, **second}}


def _by_rules(view: RunView, config: RetentionConfig, now: datetime) -> dict[str, list[str]]:
    """What rules keep, and what they are not asked about, with the reasons."""
    kept: dict[str, list[str]] = {}
    for checkpoint in view.checkpoints:
        why = _stays_as_it_is(checkpoint, view)
        if why is not None:
            kept[checkpoint.id] = [why]
    records = _startable(view)
    rules = rules_of(config)
    if not rules:
        kept |= {record.id: ["within the limits"] for record in records}
    for rule in rules:
        for checkpoint_id, why in rule.keeps(records, now).items():
            kept.setdefault(checkpoint_id, []).append(why)
    return kept


def _undecidable(view: RunView, config: RetentionConfig) -> str | None:
    """Why nothing at all goes."""
    if config.keeps_everything:
        return "no rule is configured"
    damage = [text for attempt in view.attempts for text in attempt.damage]
    if damage:
        return f"what belongs to the run cannot be told for sure: {damage[0]}"
    if view.newest is None:
        return "no checkpoint is left that a retry could start from"
    return None


def _stays_as_it_is(checkpoint: CheckpointView, view: RunView) -> str | None:
    """Why a checkpoint that no retry starts from is kept all the same."""
    newest = view.newest
    assert newest is not None
    if checkpoint.standing == "damaged":
        return "its record cannot be read: a person must look at it, and expire it by its id"
    if checkpoint.standing == "zombie" and not _has_own(view, newest):
        return "what came in its place has no checkpoint of its own yet"
    if checkpoint.standing in ("unhealthy", "quarantined") and _age(checkpoint) > _age(newest):
        return "newer than the newest that a retry would start from"
    return None


def _has_own(view: RunView, newest: CheckpointView) -> bool:
    """Whether the newest attempt that has trained has also committed."""
    trained = [attempt.number for attempt in view.attempts if attempt.resumed is not None]
    return _age(newest)[0] == max(trained, default=0)


def always_kept(view: RunView, held: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What no rule, no limit and no mark lets go, with the reasons."""
    starts = _starts_under_way(view)
    kept: dict[str, list[str]] = {}
    for checkpoint in view.checkpoints:
        reasons = [_NEWEST] if checkpoint == view.newest else []
        if checkpoint.id in starts:
            reasons.append(f"attempt {starts[checkpoint.id]} goes on from it")
        if checkpoint.pinned:
            reasons.append(f"pinned: {checkpoint.pin}")
        reasons += held.get(checkpoint.id, ())
        if reasons:
            kept[checkpoint.id] = reasons
    return kept


def _starts_under_way(view: RunView) -> dict[str, int]:
    """What attempts start from, or were told to, that have no checkpoint of their own yet."""
    owner = _age(view.newest)[0] if view.newest is not None else 0
    starts: dict[str, int] = {}
    for attempt in reversed(view.attempts):
        if attempt.number == owner:
            break
        if attempt.resumed is None and attempt.claim is not None:
            starts[attempt.claim.resume] = attempt.number  # "auto" and "fresh" are no ids
        elif attempt.resumed is not None:
            starts[attempt.resumed.checkpoint or ""] = attempt.number
            break
    return starts


def _startable(view: RunView) -> list[CommitRecord]:
    valid = (c for c in view.checkpoints if c.standing == "valid")
    return [c.record for c in valid if c.record is not None]


def _too_old(
    view: RunView, config: RetentionConfig, now: datetime, always: Collection[str]
) -> dict[str, str]:
    if config.max_age is None:
        return {}
    limit = readable_duration(config.max_age)
    return {
        record.id: f"older than {limit}"
        for record in _startable(view)
        if record.id not in always and age_of(record, now) > config.max_age
    }


def _too_large(
    kept: Sequence[CheckpointView],
    config: RetentionConfig,
    always: Collection[str],
    files: Mapping[str, Files],
) -> dict[str, str]:
    """The oldest of those kept that may go, as many as it takes for the others to fit."""
    limit = config.max_bytes
    if limit is None:
        return {}
    needed = {c.id: _files_of(c, files) for c in kept}
    users: dict[str, int] = {}
    for paths in needed.values():
        for path in paths:
            users[path] = users.get(path, 0) + 1
    total = sum(_union(needed.values()).values())
    gone: dict[str, str] = {}
    for checkpoint in reversed(kept):
        if total <= limit:
            break
        if checkpoint.id in always or checkpoint.standing != "valid":
            continue
        gone[checkpoint.id] = (
            f"what is kept would take {readable_size(total)}, more than {readable_size(limit)}"
        )
        for path, size in needed[checkpoint.id].items():
            users[path] -= 1
            total -= size if not users[path] else 0
    return gone


def _files_of(checkpoint: CheckpointView, files: Mapping[str, Files]) -> Files:
    whole = {checkpoint.id: checkpoint.record.size} if checkpoint.record is not None else {}
    return files.get(checkpoint.id, whole)


def _union(files: Iterable[Files]) -> dict[str, int]:
    return {path: size for each in files for path, size in each.items()}


def _verdict(checkpoint: CheckpointView, kept: list[str] | None, gone: str | None) -> Verdict:
    keep = kept is not None and gone is None
    return Verdict(
        checkpoint=checkpoint.id,
        keep=keep,
        why=kept if keep and kept is not None else [gone or _why_not(checkpoint)],
        standing=checkpoint.standing,
        size=checkpoint.record.size if checkpoint.record is not None else None,
    )


def _why_not(checkpoint: CheckpointView) -> str:
    if checkpoint.standing == "valid":
        return "no rule keeps it"
    if checkpoint.standing == "expired":
        return "expired already"
    return f"{checkpoint.standing}: {checkpoint.why}"


def _age(checkpoint: CheckpointView) -> tuple[int, int]:
    parsed = CheckpointId.parse(checkpoint.id)
    return parsed.attempt, parsed.sequence
