"""Collection: removes the bytes of expired checkpoints, and what killed writes have left.

Several collections may run at once, beside saves and restores, on any machines. What keeps that
safe, in this order:

1. Only what has been marked for a **grace** goes, by the store's clock and, where this machine has
   made the mark, by its uptime: a clock that is set forward ages nothing. A writer looks for marks
   right before its commit (`checkpointer.commit`), so whoever has missed one has long ended.
2. A newer checkpoint, which stays, has been **read and found right** before an older one goes.
3. The mark ``collecting`` is made by conditional create: it claims the removal. Then pins, what the
   registry holds, attempts and all records are **read again**. Who puts a pin looks for this mark
   afterwards; one of the two gives way.
4. The registry forgets the checkpoint, then its **record** goes, then its data, and the marks last.
   A collection that dies in between is completed by the next, from the mark.

Files that the index of any remaining record names stay, whoever wrote them. Where one of them
cannot be read, nothing is deleted.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterable

from ckpt_tasks.checkpointer.catalog import CheckpointView
from ckpt_tasks.checkpointer.marks import mark, read_mark
from ckpt_tasks.checkpointer.verify import check_checkpoint
from ckpt_tasks.errors import (
    CkptTasksError,
    CorruptCheckpointError,
    RegistryRefusedError,
    StaleAttemptError,
    StoreError,
)
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.fencing.process import this_uptime
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import MarkKind, RunLayout
from ckpt_tasks.format.records import MarkRecord, Uptime, now
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.retention.plan import always_kept
from ckpt_tasks.retention.references import files_of
from ckpt_tasks.retention.report import CollectReport, Remaining
from ckpt_tasks.retention.survey import Refused, Survey, survey
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["collect"]


def collect(
    store: Store,
    run: str,
    *,
    grace: float,
    by: str,
    registry: Registry | None = None,
    fence: Fence | None = None,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
    uptime: Callable[[], Uptime | None] = this_uptime,
) -> CollectReport:
    """Remove what has expired long enough ago, and what killed writes have left.

    Parameters
    ----------
    grace
        Seconds, by the store's clock, that a mark or an unfinished write must be old. Must exceed
        the longest pause of a writer between its last look at the marks and its commit, and the
        longest restore.
    by
        Who does so, for people.
    registry
        With the run bound; ``None`` where the run is in none.
    fence
        Of the attempt in whose name it is done, if of any.
    dry_run
        Only tell what would be done. No checkpoint is verified.
    uptime
        Tells the time by this machine's clock that nobody sets.

    Returns
    -------
    CollectReport
        What was removed, what stays for now, and why. Where it could not be known what is needed,
        nothing was deleted, and `CollectReport.refused` says why.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        It is a replica.
    StaleAttemptError
        A later attempt owns the run.
    StoreError
        Storage failed. What was begun is completed by the next collection.
    """
    collection = _Collection(store, RunLayout(run), grace, by, registry, fence, clock, uptime)
    try:
        if dry_run:
            collection.preview()
        else:
            collection.run()
    except Refused as refusal:
        collection.report.refused = str(refusal)
    return collection.report


class _Collection:
    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        grace: float,
        by: str,
        registry: Registry | None,
        fence: Fence | None,
        clock: Callable[[], float],
        uptime: Callable[[], Uptime | None],
    ) -> None:
        self._store = store
        self._layout = layout
        self._grace = grace
        self._by = f"{by} ({uuid.uuid4().hex[:12]})"
        self._registry = registry
        self._fence = fence
        self._clock = clock
        self._uptime = uptime
        self._claimed: dict[CheckpointId, float] = {}  # whose mark is this collection's, and when
        self.report = CollectReport(run=layout.run)

    def preview(self) -> None:
        found = self._survey(asks_time=False)
        victims = self._due(found)
        self.report.removed = [str(victim) for victim in victims]
        needed = self._needed(found, victims)
        doomed = {path for victim in victims for path in self._files(found, victim)[0]}
        doomed |= {path for paths in self._leftovers(found).values() for path in paths}
        self.report.freed = sum(found.data[path].size for path in doomed - needed)
        self.report.leftovers = sorted(self._leftovers(found))
        self.report.uploads = len(self._store.list_uploads(self._layout.folder, self._grace))

    def run(self) -> None:
        found = self._survey(asks_time=True)
        victims = self._with_newer_verified(found, self._due(found))
        removed: list[CheckpointId] = []
        try:
            claimed = [victim for victim in victims if self._claim(found, victim)]
            if claimed:
                found = self._survey(asks_time=True)
                removed = self._remove_all(found, self._still_due(found, claimed))
        except (Refused, StaleAttemptError, StoreError):
            # What stays marked is left alone for a grace by the next collection, too: one that
            # a full disk has stopped must not stop that.
            with contextlib.suppress(StoreError):
                self._withdraw(list(self._claimed))
            raise
        self._remove_leftovers(found, removed)

    # -- deciding --------------------------------------------------------------------------------

    def _survey(self, *, asks_time: bool) -> Survey:
        return survey(
            self._store,
            self._layout,
            self._registry,
            by=self._by,
            asks_time=asks_time,
            fence=self._fence,
        )

    def _due(self, found: Survey) -> list[CheckpointId]:
        """What may go, oldest first; what has to wait, and what stays, is reported."""
        kept = _kept(found)
        due = []
        for checkpoint, since in sorted(found.tombstones.items(), key=_age):
            left = self._left(checkpoint, found.now - since)
            if checkpoint in kept:
                self._stays(checkpoint, kept[checkpoint])
            elif left >= 0 and checkpoint not in found.marks["collecting"]:
                self.report.waiting.append(
                    Remaining(str(checkpoint), f"{left:.0f} s of grace left")
                )
            else:
                due.append(checkpoint)
        return due

    def _left(self, checkpoint: CheckpointId, age: float) -> float:
        """Seconds of its grace; negative once it is over, by whatever clock is known."""
        if age <= self._grace:
            return self._grace - age
        record = read_mark(self._store, self._layout, "expired", checkpoint)
        return self._grace - min(age, self._age_by_uptime(record.uptime if record else None))

    def _age_by_uptime(self, since: Uptime | None) -> float:
        """Seconds; infinite where this machine, since it was started, cannot know."""
        here = self._uptime()
        if since is None or here is None or since.boot_id != here.boot_id:
            return math.inf
        return here.seconds - since.seconds

    def _with_newer_verified(
        self, found: Survey, victims: list[CheckpointId]
    ) -> list[CheckpointId]:
        """Those than which a newer one, that stays, was read and found right; else that is done."""
        if not victims:
            return []
        if found.view.newest is None:
            if found.records:
                raise Refused("no checkpoint is left that a retry could start from")
            return victims  # of removed records, only data and marks are left
        verified = found.newest_verified(without=victims)
        if verified is None or any(_age_of(v) >= _age_of(verified) for v in victims):
            verified = self._verify(found)
        self.report.verified = str(verified)
        return victims

    def _verify(self, found: Survey) -> CheckpointId:
        """Read all of the newest checkpoint. A damaged one is quarantined, as recovery does."""
        while (newest := found.view.newest) is not None and newest.record is not None:
            checkpoint = newest.record.checkpoint
            try:
                check_checkpoint(self._store, self._layout, newest.record)
            except CorruptCheckpointError as error:
                self._mark("quarantined", checkpoint, str(error)[:4000])
                found = self._survey(asks_time=False)
                continue
            self._mark("verified", checkpoint, "every byte was read, and is what was committed")
            return checkpoint
        raise Refused("no checkpoint is left that a retry could start from")

    def _mark(self, kind: MarkKind, checkpoint: CheckpointId, why: str) -> None:
        self._check_fence()
        mark(self._store, self._layout, kind, checkpoint, why=why, by=self._by)

    def _still_due(self, found: Survey, claimed: list[CheckpointId]) -> list[CheckpointId]:
        """Give back what turns out to be needed, now that others can see the marks, and that the
        newest may have been found damaged; and what another collection has removed since.
        """
        kept = _kept(found)
        needed = [victim for victim in claimed if victim in kept]
        for victim in needed:
            self._stays(victim, kept[victim])
        expired = found.marks["expired"]
        gone = [one for one in self._claimed if one not in kept and one not in expired]
        self._withdraw([*needed, *gone])
        if found.view.newest is None and found.records:
            raise Refused("no checkpoint is left that a retry could start from")
        return [victim for victim in claimed if victim not in needed and victim not in gone]

    def _needed(self, found: Survey, victims: list[CheckpointId]) -> set[str]:
        """Every object that a remaining record needs."""
        return found.files_needed(self._store, without=set(victims))

    # -- claiming --------------------------------------------------------------------------------

    def _claim(self, found: Survey, victim: CheckpointId) -> bool:
        """Whether the removal is this collection's to do: newly claimed, or given up by another."""
        record = MarkRecord(checkpoint=str(victim), why="being removed", by=self._by, at=now())
        path = self._layout.mark("collecting", victim)
        began = self._clock()
        self._check_fence()
        if create_once(self._store, path, encode(record)):
            self._claimed[victim] = began
            return True
        info = found.marks["collecting"].get(victim)
        if info is not None and found.now - found.time_of(info) > self._grace:
            return True
        self._stays(victim, "another collection removes it")
        return False

    def _withdraw(self, victims: Iterable[CheckpointId]) -> None:
        """Remove marks of this collection, which nobody else has acted on yet: others leave them
        alone for a grace.
        """
        for victim in victims:
            began = self._claimed.pop(victim, None)
            if began is not None and self._clock() - began < self._grace:
                self._store.delete(self._layout.mark("collecting", victim))

    # -- removing --------------------------------------------------------------------------------

    def _remove_all(self, found: Survey, victims: list[CheckpointId]) -> list[CheckpointId]:
        """Remove those that the registry lets go, which are returned.

        Until the registry has forgotten it, a victim may turn out to stay: so what it needs is
        needed while others go before it.
        """
        needed = self._needed(found, victims)
        files = {victim: self._files(found, victim) for victim in victims}
        removed: list[CheckpointId] = []
        for victim in victims:
            own, indexes = files.pop(victim)
            others = (paths for paths, _ in files.values())
            if self._forget(victim):
                self._remove(found, victim, own - needed.union(*others), indexes)
                removed.append(victim)
            else:
                needed |= own
        return removed

    def _forget(self, victim: CheckpointId) -> bool:
        """Have the registry forget it; False where it stays, as somebody uses it there."""
        self._check_fence()
        if self._registry is not None:
            try:
                self._registry.forget(str(victim))
            except RegistryRefusedError as error:
                self._stays(victim, str(error))
                self._withdraw([victim])
                return False
            except CkptTasksError as error:
                self._withdraw([victim])
                raise Refused(f"the registry cannot forget {victim}: {error}") from error
        return True

    def _remove(
        self, found: Survey, victim: CheckpointId, paths: set[str], indexes: set[str]
    ) -> None:
        """Its record, then what nothing else needs, the indexes among it last, as they tell what
        else there was; then its marks.
        """
        self._claimed.pop(victim, None)  # from here on any collection would end what is begun
        self._store.delete(self._layout.commit(victim))
        for path in [*sorted(paths - indexes), *sorted(paths & indexes)]:
            self._delete(found, path)
        kinds: tuple[MarkKind, ...] = ("quarantined", "verified", "expired", "collecting")
        for kind in kinds:
            self._store.delete(self._layout.mark(kind, victim))
        self.report.removed.append(str(victim))

    def _files(self, found: Survey, victim: CheckpointId) -> tuple[set[str], set[str]]:
        """All that a victim has, and has referred to, as far as it is there; and its indexes."""
        own = {path for path in found.data if found.write_of(path) == _age_of(victim)}
        named: set[str] = set()
        record = found.records.get(victim)
        if record is not None:
            try:
                named = set(files_of(self._store, self._layout, record))
            except CorruptCheckpointError:
                named = set()  # damaged: what it referred to is found as a leftover, one day
        else:
            named = found.named_by_indexes(self._store, own)
        indexes = {path for path in own if path.endswith(".index.json")}
        return (own | named) & found.data.keys(), indexes

    def _delete(self, found: Survey, path: str) -> None:
        self._store.delete(path)
        self.report.freed += found.data[path].size

    # -- what killed writes have left ------------------------------------------------------------

    def _leftovers(self, found: Survey) -> dict[str, list[str]]:
        """By folder: data of writes without a record that have not been touched for a grace, and
        not of an attempt that may still commit or refer to them.
        """
        committed = {_age_of(checkpoint) for checkpoint in (*found.records, *found.tombstones)}
        writes: dict[str, list[str]] = {}
        for path in found.data:
            if found.write_of(path) not in (None, *committed):
                writes.setdefault(path.rpartition("/")[0], []).append(path)
        return {
            folder: paths
            for folder, paths in writes.items()
            if not self._may_be_in_use(found, paths)
        }

    def _may_be_in_use(self, found: Survey, paths: list[str]) -> bool:
        written = max(found.time_of(found.data[path]) for path in paths)
        if found.now - written <= self._grace:
            return True
        write = found.write_of(paths[0])
        assert write is not None
        return write[0] >= found.newest_attempt and self._may_live(found)

    def _may_live(self, found: Survey) -> bool:
        """Whether the newest attempt has shown life within the grace."""
        if found.shows_life_within(self._grace):
            return True
        beat = read_heartbeat(self._store, self._layout, found.newest_attempt)
        return beat is not None and self._age_by_uptime(beat.uptime) <= self._grace

    def _remove_leftovers(self, found: Survey, removed: list[CheckpointId]) -> None:
        leftovers = self._leftovers(found)
        needed = self._needed(found, removed) if leftovers else set()
        for folder, paths in leftovers.items():
            self._check_fence()
            unneeded = [path for path in paths if path not in needed]
            for path in unneeded:
                self._delete(found, path)
            if unneeded:
                self.report.leftovers.append(folder)
        self._check_fence()
        aborted = self._store.abort_uploads(self._layout.folder, self._grace)
        self.report.uploads = len(aborted)

    # ----------------------------------------------------------------------------------------------

    def _stays(self, checkpoint: CheckpointId, why: str) -> None:
        self.report.kept.append(Remaining(str(checkpoint), why))

    def _check_fence(self) -> None:
        if self._fence is not None:
            self._fence.check()


def _kept(found: Survey) -> dict[CheckpointId, str]:
    """What must stay, be it expired or not, and why."""
    always = always_kept(found.view, found.held)
    kept = {CheckpointId.parse(one): "; ".join(reasons) for one, reasons in always.items()}
    newest = found.view.newest
    if newest is not None:
        why = f"newer than {newest.id}, from which a retry would start"
        newer = (one for one in found.may_be_started_from() if _is_newer(one, newest))
        kept |= {one: why for one in newer if one not in kept}
    return kept


def _age_of(checkpoint: CheckpointId) -> tuple[int, int]:
    return checkpoint.attempt, checkpoint.sequence


def _is_newer(checkpoint: CheckpointId, than: CheckpointView) -> bool:
    return _age_of(checkpoint) > _age_of(CheckpointId.parse(than.id))


def _age(item: tuple[CheckpointId, float]) -> tuple[int, int]:
    return _age_of(item[0])
