"""Reading the attempts of a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import MAX_COMMIT_BYTES, AttemptClaim, CommitRecord, ResumedRecord
from ckpt_tasks.store.base import Store

R = TypeVar("R", AttemptClaim, ResumedRecord)

__all__ = ["MAX_RECORD_BYTES", "AttemptView", "list_attempts", "next_attempt", "read_attempts"]

MAX_RECORD_BYTES = 1024 * 1024
_PARALLEL_READS = 16
_FEW = 4  # read one after the other: threads would gain nothing


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt as the store tells it.

    Parameters
    ----------
    claim
        Who executes it; ``None`` where that record is damaged.
    resumed
        What it resumed from; without it the attempt never trained.
    damage
        What was wrong with its records, for people.
    """

    number: int
    claim: AttemptClaim | None
    resumed: ResumedRecord | None
    damage: tuple[str, ...] = ()


def list_attempts(store: Store, layout: RunLayout) -> list[int]:
    """Numbers of the claimed attempts, ascending."""
    found = (layout.attempt_number(info.path) for info in store.list_objects(layout.attempts))
    return sorted(number for number in found if number is not None)


def next_attempt(numbers: list[int]) -> int:
    """The number that the next claim takes; dense, from 1."""
    return max(numbers, default=0) + 1


def read_attempts(
    store: Store, layout: RunLayout, *, before: int | None = None
) -> list[AttemptView]:
    """Every attempt of the run, ascending; with `before`, only those claimed earlier.

    A damaged record is reported in the view. What an attempt resumed from also stands in each
    of its commit records; an attempt with neither committed nothing, so passing it over loses
    nothing.
    """
    paths = {info.path for info in store.list_objects(layout.attempts)}
    numbers = sorted(n for n in map(layout.attempt_number, paths) if n is not None)
    wanted = [number for number in numbers if before is None or number < before]

    def read(number: int) -> AttemptView:
        return _view(store, layout, number, has_resumed=layout.resumed(number) in paths)

    if len(wanted) <= _FEW:
        return [read(number) for number in wanted]
    with ThreadPoolExecutor(min(len(wanted), _PARALLEL_READS)) as pool:
        return list(pool.map(read, wanted))


def _view(store: Store, layout: RunLayout, number: int, *, has_resumed: bool) -> AttemptView:
    claim: AttemptClaim | None = None
    resumed: ResumedRecord | None = None
    damage: list[str] = []
    try:
        claim = _read(store, layout.attempt(number), AttemptClaim, number)
    except CorruptCheckpointError as error:
        damage.append(str(error))
    if has_resumed:
        try:
            resumed = _read(store, layout.resumed(number), ResumedRecord, number)
        except CorruptCheckpointError as error:
            damage.append(str(error))
            resumed = _resumed_from_commits(store, layout, number)
    return AttemptView(number=number, claim=claim, resumed=resumed, damage=tuple(damage))


def _read(store: Store, path: str, kind: type[R], number: int) -> R:
    """An attempt's record; of another attempt it would lead lineages round in circles."""
    record = decode(store.read(path, limit=MAX_RECORD_BYTES), kind, path=path)
    if record.attempt != number:
        raise CorruptCheckpointError(f"{path} is of attempt {record.attempt}, not {number}")
    return record


def _resumed_from_commits(store: Store, layout: RunLayout, number: int) -> ResumedRecord | None:
    for info in store.list_objects(layout.commits):
        checkpoint = layout.checkpoint_id(info.path)
        if checkpoint is None or checkpoint.attempt != number:
            continue
        try:
            data = store.read(info.path, limit=MAX_COMMIT_BYTES)
            commit = decode(data, CommitRecord, path=info.path)
        except CorruptCheckpointError:
            continue  # Another commit of the same attempt says the same.
        if commit.checkpoint != checkpoint:
            continue
        return ResumedRecord(
            attempt=number,
            checkpoint=commit.lineage[0].resumed_from,
            lineage=commit.lineage,
            why="read from the lineage of a commit, as the attempt's own record is damaged",
            resumed_at=commit.created_at,
        )
    return None
