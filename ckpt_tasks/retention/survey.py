"""All that a collection must know of a run, or `Refused`: what is not known may be needed."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from ckpt_tasks.checkpointer.catalog import CheckpointView, RunView, view_run
from ckpt_tasks.checkpointer.marks import list_marks
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RegistryError,
    UnsupportedFormatError,
)
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import MarkKind, RunLayout
from ckpt_tasks.format.records import MAX_INDEX_BYTES, CommitRecord, Index, MarkRecord, now
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.retention.holds import what_is_held
from ckpt_tasks.retention.references import files_of, files_of_each
from ckpt_tasks.store.base import ObjectInfo, Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Refused", "Survey", "survey"]

_HEARTBEAT_OR_CLAIM = re.compile(r"/([0-9]{4,9})(?:\.heartbeat|(?:\.resumed)?\.json)$", re.ASCII)


class Refused(Exception):  # noqa: N818 - an answer within this package, never an error outside
    """Why nothing may be deleted."""


class Survey(msgspec.Struct, kw_only=True):
    """A run as it was found.

    Parameters
    ----------
    now
        By the store's clock, in seconds since the epoch.
    data
        The objects below the run's ``data/``, listed before any record was read, by path.
    attempts
        The objects of its attempts.
    marks
        As found last.
    records
        Every commit record that can be read.
    held
        By the registry, with reasons.
    """

    layout: RunLayout
    now: float
    view: RunView
    data: dict[str, ObjectInfo]
    attempts: list[ObjectInfo]
    marks: dict[MarkKind, dict[CheckpointId, ObjectInfo]]
    records: dict[CheckpointId, CommitRecord]
    held: Mapping[str, Sequence[str]]

    @property
    def tombstones(self) -> dict[CheckpointId, float]:
        """When each expired checkpoint was marked, be its record there or not."""
        marks = {**self.marks["collecting"], **self.marks["expired"]}
        return {checkpoint: self.time_of(info) for checkpoint, info in marks.items()}

    @property
    def newest_attempt(self) -> int:
        return max((attempt.number for attempt in self.view.attempts), default=0)

    def time_of(self, info: ObjectInfo) -> float:
        """When an object was written, by the store's clock."""
        if info.modified is None:
            raise Refused("the store does not tell when an object was written")
        return info.modified

    def write_of(self, path: str) -> tuple[int, int] | None:
        """Attempt and sequence of the write that an object of `data` belongs to."""
        return self.layout.write_of(path)

    def shows_life_within(self, seconds: float) -> bool:
        """Whether the newest attempt was claimed, resumed, or has beaten so recently."""
        times = [
            self.time_of(info)
            for info in self.attempts
            if (match := _HEARTBEAT_OR_CLAIM.search(info.path))
            and int(match[1]) == self.newest_attempt
        ]
        return any(self.now - at <= seconds for at in times)

    def newest_verified(self, *, without: Collection[CheckpointId]) -> CheckpointId | None:
        """The newest checkpoint that a retry could start from and that was read as a whole."""
        starts = {a.resumed.checkpoint for a in self.view.attempts if a.resumed is not None}
        for checkpoint in self.view.checkpoints:
            parsed = CheckpointId.parse(checkpoint.id)
            read = checkpoint.id in starts or parsed in self.marks["verified"]
            if read and checkpoint.standing == "valid" and parsed not in without:
                return parsed
        return None

    def may_be_started_from(self) -> set[CheckpointId]:
        """Healthy ones of the run's lineage, whether expired or not."""
        healthy = {id_ for id_, record in self.records.items() if not record.nonfinite}
        valid = trace_lineage(self.view.attempts).valid(healthy)
        return set(valid) - self.marks["quarantined"].keys()

    def files_needed(self, store: Store, *, without: Collection[CheckpointId]) -> set[str]:
        """Every object that a record needs, but for some records.

        Quarantined ones that cannot be read count as needing their own write's objects only.
        Raises `Refused` where another one cannot be read.
        """
        remaining = {id_: r for id_, r in self.records.items() if id_ not in without}
        needed = {path for path in self.data if self.write_of(path) in _ages(remaining)}
        sound = [r for id_, r in remaining.items() if id_ not in self.marks["quarantined"]]
        for files in files_of_each(sound, lambda record: self._files_of(store, record)).values():
            needed |= files.keys()
        for id_, record in remaining.items():
            if id_ in self.marks["quarantined"]:
                own = {self.layout.in_run(ref.path) for ref in record.indexes}
                needed |= self.named_by_indexes(store, own)
        return needed

    def _files_of(self, store: Store, record: CommitRecord) -> dict[str, int]:
        try:
            return files_of(store, self.layout, record)
        except (CorruptCheckpointError, UnsupportedFormatError) as error:
            if not store.exists(self.layout.commit(record.checkpoint)):
                return {}  # another collection has removed it since
            raise Refused(f"which files are needed cannot be told: {error}") from error

    def named_by_indexes(self, store: Store, paths: Iterable[str]) -> set[str]:
        """Files that those of `paths` which are readable indexes name."""
        named: set[str] = set()
        for path in paths:
            if path.endswith(".index.json") and path in self.data:
                try:
                    data = store.read(path, limit=MAX_INDEX_BYTES)
                    index = decode(data, Index, path=path)
                    named |= {self.layout.in_run(file.path) for file in index.files}
                except (CorruptCheckpointError, ValueError):
                    continue  # damaged: what it named is found as a leftover, should it be one
        return named


def survey(
    store: Store, layout: RunLayout, registry: Registry | None, *, by: str, asks_time: bool
) -> Survey:
    """Look at all of a run: data first, so that no record is missed whose data was seen.

    Parameters
    ----------
    asks_time
        Write an object, to learn the store's time from it. Else this machine's is taken where it
        is the later of the two.

    Raises
    ------
    Refused
        Something cannot be read, so that nothing may be deleted.
    ConfigError
        The run is a replica. A copy under way counts on the files that it has found there, which
        no record names yet: they would be taken for what a killed write has left.
    """
    check_not_replica(store, read_run(store, layout))
    if asks_time:
        probe = MarkRecord(checkpoint="", why="a collection began", by=by, at=now())
        store.put(layout.collected, encode(probe))
    objects = store.list_objects(layout.folder)
    times = [info.modified for info in objects if info.modified is not None]
    if len(times) < len(objects):
        raise Refused("the store does not tell when an object was written")
    newest = max(times, default=0.0)
    marks = list_marks(store, layout)
    view = view_run(store, layout.run)
    _check_readable(store, layout, view, marks)
    try:
        held = what_is_held(store, layout, registry)
    except RegistryError as error:
        raise Refused(f"what the registry holds is not known: {error}") from error
    return Survey(
        layout=layout,
        now=newest if asks_time else max(newest, time.time()),
        view=view,
        data={info.path: info for info in objects if info.path.startswith(layout.data)},
        attempts=[info for info in objects if info.path.startswith(layout.attempts)],
        marks=marks,
        records={c.record.checkpoint: c.record for c in view.checkpoints if c.record is not None},
        held=held,
    )


def _check_readable(
    store: Store,
    layout: RunLayout,
    view: RunView,
    marks: Mapping[MarkKind, Mapping[CheckpointId, ObjectInfo]],
) -> None:
    damage = [text for attempt in view.attempts for text in attempt.damage]
    if damage:
        raise Refused(f"what belongs to the run cannot be told: {damage[0]}")
    for checkpoint in view.checkpoints:
        if checkpoint.record is None:
            _check_given_up(store, layout, checkpoint, marks)


def _check_given_up(
    store: Store,
    layout: RunLayout,
    checkpoint: CheckpointView,
    marks: Mapping[MarkKind, Mapping[CheckpointId, ObjectInfo]],
) -> None:
    """A record that cannot be read must have been expired by a person; never a later version's."""
    parsed = CheckpointId.parse(checkpoint.id)
    try:
        read_commit(store, layout, parsed)
    except UnsupportedFormatError as error:
        raise Refused(f"a later version has written here: {error}") from error
    except CorruptCheckpointError as error:
        if parsed not in marks["expired"] and parsed not in marks["collecting"]:
            raise Refused(
                f"what a damaged checkpoint needs cannot be told: {error}. `ckpt-tasks expire "
                f"{layout.run}@{checkpoint.id}` gives it up"
            ) from error
    except CheckpointNotFoundError:
        return  # removed since
    else:
        raise Refused(f"the record of {checkpoint.id} could be read at the second try only")


def _ages(checkpoints: Iterable[CheckpointId]) -> set[tuple[int, int]]:
    return {(checkpoint.attempt, checkpoint.sequence) for checkpoint in checkpoints}
