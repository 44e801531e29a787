"""Copying a run's checkpoints to another store, where they are a read-only replica of it.

In the order of a commit: the run's identity, with the mark that it is a replica; its attempts; then
for each checkpoint, oldest first, the files that it refers to, its indexes, and last its record, by
conditional create. Every object keeps its path in the run's folder, and its bytes, so references
stay true. A copy only adds. So it may be killed, repeated, and done twice at once: files appear
whole (`Store.replace`), and whoever finds one there that no record names yet verifies it.

Nothing holds the source's collections up. What goes meanwhile was not copied, and has no record in
the replica. Nothing is collected from a replica (`fencing.replica`), so what a copy has found there
stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from ckpt_tasks.checkpointer.catalog import (
    CheckpointView,
    list_checkpoints,
    read_checkpoints,
    view_run,
)
from ckpt_tasks.checkpointer.marks import list_marks, read_completed, write_completed
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StaleAttemptError,
)
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES, list_attempts
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import (
    MAX_COMMIT_BYTES,
    AttemptClaim,
    CommitRecord,
    CompletedRecord,
    Replica,
    ResumedRecord,
    RunRecord,
    now,
)
from ckpt_tasks.replica.closure import read_closure
from ckpt_tasks.replica.data import ReplicaData
from ckpt_tasks.replica.report import CopyReport, NotCopied
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["copy"]

_WANTED = ("valid", "zombie", "unhealthy", "damaged")
"""Standings of checkpoints that a copy of the whole run takes; the last, to tell that it cannot."""

_ABANDONED = 24 * 3600.0
"""Seconds after which a file that is not whole yet was left by a killed copy."""


def copy(
    source: Store,
    target: Store,
    run: str,
    *,
    checkpoint: CheckpointId | None = None,
    on_copied: Callable[[str, int], None] = lambda checkpoint, size: None,
) -> CopyReport:
    """Make a run's checkpoints, or one of them, exist in another store, every byte verified.

    What an earlier copy has brought is not copied again.

    Parameters
    ----------
    source
        Is only read.
    target
        Opened for writing.
    checkpoint
        Only this one, whatever its standing, and repaired where it is there already and damaged;
        default: all that are kept and not known to be damaged.
    on_copied
        Called with the id of each checkpoint that exists there from now on, and the bytes that
        this took.

    Returns
    -------
    CopyReport
        Where the source has other bytes than were committed, or has given a checkpoint up
        meanwhile, the others were copied and the report says so.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run or checkpoint, or the one asked for has just been collected.
    ConfigError
        Both are the same store; or the target has another run of that name, or the run itself.
    StaleAttemptError
        The replica has been adopted meanwhile.
    CorruptCheckpointError
        The checkpoint asked for is damaged; or the target has another record under its id.
    StoreError
        One of the stores failed. A repeated copy goes on from there.
    """
    started = time.perf_counter()
    copying = _Copy(source, target, run, checkpoint, on_copied)
    copying.run()
    copying.report.seconds = time.perf_counter() - started
    return copying.report


class _Copy:
    def __init__(
        self,
        source: Store,
        target: Store,
        run: str,
        only: CheckpointId | None,
        on_copied: Callable[[str, int], None],
    ) -> None:
        if source.url == target.url:
            raise ConfigError(f"{source.url} is where run {run!r} lies; name another store")
        self._source = source
        self._target = target
        self._layout = RunLayout(run)
        self._only = only
        self._on_copied = on_copied
        # Before the attempts are listed: whose commit is seen has claimed and resumed by then.
        self._view = view_run(source, run)
        self._data = ReplicaData(source, target, self._layout)
        self.report = CopyReport(
            run=run, uid=self._view.run.uid, source=source.url, target=target.url
        )
        self._chosen = self._choose()

    def run(self) -> None:
        self._open_replica()
        self._copy_attempts()
        there = set(list_checkpoints(self._target, self._layout))
        self._data.look()
        if self._only is None:
            self._check_same([record for record in self._chosen if record.checkpoint in there])
        for record in self._chosen:
            if record.checkpoint in there and self._only is None:
                self.report.there.append(record.id)
                self._data.remember(record)
            else:
                self._copy_or_tell(record)
        self._copy_marks({*there, *map(CheckpointId.parse, self.report.copied)})
        self._target.abort_uploads(self._layout.folder, _ABANDONED)

    # -- what is copied --------------------------------------------------------------------------

    def _choose(self) -> list[CommitRecord]:
        """Oldest first, so that what they have in common is copied with the first."""
        chosen = [c for c in reversed(self._view.checkpoints) if self._is_wanted(c)]
        if self._only is not None and not chosen:
            raise CheckpointNotFoundError(
                f"run {self._layout.run!r} has no checkpoint {self._only} in {self._source.url}; "
                "`ckpt-tasks ls` lists them"
            )
        for checkpoint in chosen:
            if checkpoint.record is None and self._only is not None:
                raise CorruptCheckpointError(f"{self._only} cannot be read: {checkpoint.why}")
            if checkpoint.record is None:
                self._tell(self.report.damaged, checkpoint.id, checkpoint.why or "")
        return [c.record for c in chosen if c.record is not None]

    def _is_wanted(self, checkpoint: CheckpointView) -> bool:
        if self._only is not None:
            return checkpoint.id == str(self._only)
        if checkpoint.standing == "quarantined":
            self._tell(self.report.left, checkpoint.id, f"quarantined: {checkpoint.why}")
        return checkpoint.standing in _WANTED

    @staticmethod
    def _tell(told: list[NotCopied], checkpoint: str, why: str) -> None:
        told.append(NotCopied(checkpoint=checkpoint, why=why))

    # -- the run and its attempts ----------------------------------------------------------------

    def _open_replica(self) -> None:
        """Make the target's ``run.json``, or see that what lies there is this run's replica."""
        try:
            found = read_run(self._target, self._layout)
        except CheckpointNotFoundError:
            found = self._make_replica()
        where = f"run {self._layout.run!r} in {self._target.url}"
        if found.uid != self._view.run.uid:
            if any(a.uid == self._view.run.uid for a in found.ancestors or []):
                raise ConfigError(
                    f"{where} was a replica of this one, and was adopted: it goes its own way, and "
                    "takes no copies any more; name another store"
                )
            raise ConfigError(f"{where} is another run of that name; name another store")
        if not found.replica:
            raise ConfigError(f"{where} is this run itself, not a replica; name another store")

    def _make_replica(self) -> RunRecord:
        mark = Replica(source=self._source.url, since=now())
        record = msgspec.structs.replace(self._view.run, replica=mark)
        if not create_once(self._target, self._layout.run_record, encode(record)):
            return read_run(self._target, self._layout)
        self._count(len(encode(record)))
        return record

    def _copy_attempts(self) -> None:
        """Who trained, and what each attempt resumed from: without heartbeats, which are signs of
        life, and no copy lives.

        Ascending: a gap in their numbers would let nobody train when the replica is adopted.
        """
        numbers = list_attempts(self._source, self._layout)
        if self._only is not None:
            numbers = [number for number in numbers if number <= self._only.attempt]
        listed = self._target.list_objects(self._layout.attempts)
        there = {info.path for info in listed}
        self._check_not_being_adopted(list_attempts(self._target, self._layout))
        for number in numbers:
            claim, resumed = self._layout.attempt(number), self._layout.resumed(number)
            if claim not in there:
                self._copy_record(claim, AttemptClaim)
            if resumed not in there and self._source.exists(resumed):
                self._copy_record(resumed, ResumedRecord)

    def _check_not_being_adopted(self, numbers: list[int]) -> None:
        """An adoption takes the next number first; then it is no longer one with this run's."""
        if not numbers:
            return
        path = self._layout.attempt(numbers[-1])
        try:
            data = self._target.read(path, limit=MAX_RECORD_BYTES)
            claim = decode(data, AttemptClaim, path=path)
        except CorruptCheckpointError:
            return  # copied as it was, so no adoption's
        if not self._view.run.owns(claim.uid, claim.attempt):
            raise self._adopted()

    def _copy_record(self, path: str, kind: type[AttemptClaim | ResumedRecord]) -> None:
        """A damaged one is copied as it is: its number counts, and readers know about damage."""
        data = self._source.read(path, limit=MAX_RECORD_BYTES)
        try:
            decode(data, kind, path=path)
        except CorruptCheckpointError:  # perhaps on the way only
            data = self._source.read(path, limit=MAX_RECORD_BYTES)
        if not create_once(self._target, path, data):
            raise self._adopted()  # which has taken the number
        self._count(len(data))

    # -- one checkpoint --------------------------------------------------------------------------

    def _copy_or_tell(self, record: CommitRecord) -> None:
        before = self.report.size
        try:
            self._copy_checkpoint(record)
        except CorruptCheckpointError as error:
            gone = self._is_given_up(record.checkpoint)
            if self._only is not None and not gone:
                raise
            if self._only is not None:
                raise CheckpointNotFoundError(
                    f"{record.id} of run {self._layout.run!r} was given up while it was copied"
                ) from error
            if gone:
                self._tell(self.report.left, record.id, "given up while it was copied")
            else:
                self._tell(self.report.damaged, record.id, str(error))
        else:
            self.report.copied.append(record.id)
            self._on_copied(record.id, self.report.size - before)

    def _copy_checkpoint(self, record: CommitRecord) -> None:
        layout, path = self._layout, self._layout.commit(record.checkpoint)
        data = self._read_commit(record)
        closure = read_closure(self._source, layout, record)
        for size in self._data.bring(closure):
            self._count(size)
        self._data.check(closure)
        self._check_still_replica()
        if not create_once(self._target, path, data):
            raise self._differs(record)
        self._count(len(data))
        self._data.remember(record, closure)

    def _read_commit(self, record: CommitRecord) -> bytes:
        path = self._layout.commit(record.checkpoint)
        try:
            data = self._source.read(path, limit=MAX_COMMIT_BYTES)
        except ObjectNotFoundError as error:
            raise CorruptCheckpointError(f"{path} is gone from {self._source.url}") from error
        if decode(data, CommitRecord, path=path) != record:
            raise CorruptCheckpointError(f"{path} in {self._source.url} has changed")
        return data

    def _check_still_replica(self) -> None:
        if not read_run(self._target, self._layout).replica:
            raise self._adopted()

    def _adopted(self) -> StaleAttemptError:
        return StaleAttemptError(
            f"the replica of run {self._layout.run!r} in {self._target.url} has been adopted, and "
            "takes no copies any more"
        )

    def _check_same(self, records: Sequence[CommitRecord]) -> None:
        """What is there under their ids are the same checkpoints."""
        ids = [record.checkpoint for record in records]
        found = read_checkpoints(self._target, self._layout, ids, run=self._view.run)
        for record in records:
            if found[record.checkpoint] != record:
                raise self._differs(record)

    def _differs(self, record: CommitRecord) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._target.url} has another record of {record.id} than {self._source.url}"
        )

    def _is_given_up(self, checkpoint: CheckpointId) -> bool:
        """Whether the source collects it, or has: the record goes first, the mark last."""
        return self._source.exists(self._layout.mark("collecting", checkpoint)) or not (
            self._source.exists(self._layout.commit(checkpoint))
        )

    # -- marks -----------------------------------------------------------------------------------

    def _copy_marks(self, there: set[CheckpointId]) -> None:
        """Pins, so that an adopted run keeps them; and that the run is complete, where the
        checkpoint that it ended with is there.
        """
        pinned = list_marks(self._target, self._layout)["pins"]
        for checkpoint in sorted(list_marks(self._source, self._layout)["pins"]):
            if checkpoint in there and checkpoint not in pinned:
                self._copy_pin(self._layout.mark("pins", checkpoint))
        completed = self._view.completed
        if completed is None or completed.checkpoint is None:
            return
        last = CheckpointId.parse(completed.checkpoint)
        if last in there and self._completed() != completed:
            write_completed(self._target, self._layout, completed)
            self._count(len(encode(completed)))

    def _copy_pin(self, path: str) -> None:
        """As it is: one that cannot be read holds too."""
        try:
            data = self._source.read(path, limit=MAX_RECORD_BYTES)
            self._target.create(path, data)
            self._count(len(data))
        except (ObjectNotFoundError, ObjectExistsError):
            return  # taken away since; or put there by another copy

    def _completed(self) -> CompletedRecord | None:
        try:
            return read_completed(self._target, self._layout)
        except CorruptCheckpointError:
            return None  # and is written again

    def _count(self, size: int) -> None:
        self.report.files += 1 if size else 0
        self.report.size += size
