"""Browsing a store: its runs, their attempts, and the standing of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from ckpt_tasks.checkpointer.marks import is_tombstoned, marked, read_completed, read_mark
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CkptTasksError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_tasks.fencing.attempts import AttemptView, read_attempts
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.format.layout import MarkKind, RunLayout, decode_name
from ckpt_tasks.format.records import CommitRecord, CompletedRecord, RunRecord
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = [
    "CheckpointView",
    "RunSummary",
    "RunView",
    "Standing",
    "is_complete",
    "list_checkpoints",
    "list_run_names",
    "list_runs",
    "read_checkpoints",
    "view_run",
]

Standing = Literal["valid", "zombie", "unhealthy", "expired", "quarantined", "damaged"]

_PARALLEL_READS = 16


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    """One committed checkpoint and whether a retry may start from it.

    Parameters
    ----------
    standing
        ``valid``: on the run's lineage. ``zombie``: beyond what a later attempt resumed from.
        ``unhealthy``: parameters hold NaN or infinity. ``expired``: no longer kept.
        ``quarantined``: found damaged. ``damaged``: its record cannot be read.
    why
        One sentence, where it is not valid.
    record
        ``None`` where it is damaged.
    pinned, pin
        Whether it must be kept, and who said so and why. A pin that cannot be read still holds.
    """

    id: str
    standing: Standing
    why: str | None
    record: CommitRecord | None
    pinned: bool
    pin: str | None = None


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run as its store tells it; checkpoints newest first."""

    run: RunRecord
    attempts: list[AttemptView]
    checkpoints: list[CheckpointView]
    completed: CompletedRecord | None

    @property
    def newest(self) -> CheckpointView | None:
        """The newest valid checkpoint."""
        return next((c for c in self.checkpoints if c.standing == "valid"), None)


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a list of runs; `problem` says why nothing more is known."""

    name: str
    created_at: str | None = None
    attempts: int = 0
    checkpoints: int = 0
    newest: str | None = None
    completed: bool = False
    replica: bool = False
    problem: str | None = None


def list_checkpoints(store: Store, layout: RunLayout) -> list[CheckpointId]:
    """Every committed checkpoint of the run, by one listing."""
    found = (layout.checkpoint_id(info.path) for info in store.list_objects(layout.commits))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def read_checkpoints(
    store: Store, layout: RunLayout, checkpoints: Iterable[CheckpointId], *, run: RunRecord
) -> dict[CheckpointId, CommitRecord | CkptTasksError]:
    """Commit records, or why one cannot be read.

    Raises `StoreError` where storage failed, which says nothing about a record.
    """

    def read(checkpoint: CheckpointId) -> CommitRecord | CkptTasksError:
        try:
            return read_commit(store, layout, checkpoint, run=run)
        except (CorruptCheckpointError, CheckpointNotFoundError, UnsupportedFormatError) as error:
            return error

    ids = list(checkpoints)
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return dict(zip(ids, pool.map(read, ids), strict=True))


def is_complete(completed: CompletedRecord | None, attempts: Iterable[AttemptView]) -> bool:
    """Whether the marker stands for the run as it is: no later attempt has trained since."""
    newest = max((a.number for a in attempts if a.resumed is not None), default=0)
    return completed is not None and completed.attempt >= newest


def view_run(store: Store, run: str) -> RunView:
    """Everything about one run.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        Its ``run.json`` is damaged.
    """
    layout = RunLayout(run)
    identity = read_run(store, layout)
    attempts = read_attempts(store, layout)
    # Before the commits: a mark that is removed by now belongs to a record that is removed, too.
    marks = marked(store, layout)
    listed = list_checkpoints(store, layout)
    records = read_checkpoints(store, layout, listed, run=identity)
    # One that is gone by now has just been collected.
    ids = [one for one in listed if not isinstance(records[one], CheckpointNotFoundError)]
    valid = set(trace_lineage(attempts).valid(ids))
    views = [
        _view(store, layout, checkpoint, records[checkpoint], marks, valid) for checkpoint in ids
    ]
    views.sort(key=lambda view: _age(view.id), reverse=True)
    completed = _completed(store, layout)
    return RunView(
        run=identity,
        attempts=attempts,
        checkpoints=views,
        completed=completed if is_complete(completed, attempts) else None,
    )


def list_runs(store: Store) -> list[RunSummary]:
    """Every run of the store, by name."""
    return [_summary(store, folder) for folder in _folders(store)]


def list_run_names(store: Store) -> list[str]:
    """Names of all runs, by one listing; a folder that no run can have stands for itself."""
    return list(dict.fromkeys(_name(folder) for folder in _folders(store)))


def _folders(store: Store) -> list[str]:
    """As texts: of a folder that another program has made, the name may be none."""
    found = [folder for folder in store.list_folders("") if not folder.startswith(".")]
    return [folder.encode("utf-8", "backslashreplace").decode("utf-8") for folder in found]


def _name(folder: str) -> str:
    try:
        return decode_name(folder)
    except ValueError:
        return folder


def _summary(store: Store, folder: str) -> RunSummary:
    try:
        return _summary_of(store, RunLayout(decode_name(folder)))
    except (ValueError, CheckpointNotFoundError, CorruptCheckpointError) as error:
        return RunSummary(name=folder, problem=str(error))


def _summary_of(store: Store, layout: RunLayout) -> RunSummary:
    identity = read_run(store, layout)
    ids = list_checkpoints(store, layout)
    attempts = read_attempts(store, layout)
    valid = trace_lineage(attempts).valid(ids)
    return RunSummary(
        name=layout.run,
        created_at=identity.created_at,
        attempts=len(attempts),
        checkpoints=len(ids),
        newest=str(valid[0]) if valid else None,
        completed=is_complete(_completed(store, layout), attempts),
        replica=bool(identity.replica),
    )


def _completed(store: Store, layout: RunLayout) -> CompletedRecord | None:
    try:
        return read_completed(store, layout)
    except CorruptCheckpointError:
        return None


def _age(checkpoint: str) -> tuple[int, int]:
    parsed = CheckpointId.parse(checkpoint)
    return parsed.attempt, parsed.sequence


def _view(
    store: Store,
    layout: RunLayout,
    checkpoint: CheckpointId,
    record: CommitRecord | CkptTasksError,
    marks: dict[MarkKind, set[CheckpointId]],
    valid: set[CheckpointId],
) -> CheckpointView:
    standing: Standing = "valid"
    why: str | None = None
    if isinstance(record, CkptTasksError):
        standing, why = "damaged", str(record)
    elif checkpoint in marks["quarantined"]:
        quarantine = read_mark(store, layout, "quarantined", checkpoint)
        standing, why = "quarantined", quarantine.why if quarantine else "found damaged"
    elif is_tombstoned(checkpoint, marks):
        standing, why = "expired", "no longer kept"
    elif checkpoint not in valid:
        standing, why = "zombie", "a later attempt went on from an earlier checkpoint"
    elif record.nonfinite:
        standing, why = "unhealthy", f"NaN or infinity in {', '.join(record.nonfinite[:3])}"
    return CheckpointView(
        id=str(checkpoint),
        standing=standing,
        why=why,
        record=None if isinstance(record, CkptTasksError) else record,
        pinned=checkpoint in marks["pins"],
        pin=_pin(store, layout, checkpoint) if checkpoint in marks["pins"] else None,
    )


def _pin(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> str:
    pin = read_mark(store, layout, "pins", checkpoint)
    if pin is None:
        return f"{layout.mark('pins', checkpoint)} is damaged: who pinned it, and why, is lost"
    return f"{pin.why} ({pin.by})"
