"""Publishing an attempt to a registry: what is committed gets registered, metrics once.

Nothing here is urgent and nothing is lost: work waits in a queue while the registry is away, and
what a dead registrar left undone is found again from the store by the next one.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RegistryRefusedError,
)
from ckpt_tasks.events import (
    CheckpointRegistered,
    EventSink,
    MetricsReplayed,
    RegistryLinked,
    Warned,
)
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RegistryRunIds, RunRecord
from ckpt_tasks.masking import mask_url
from ckpt_tasks.registry.base import (
    Registration,
    Registry,
    RunDescription,
    RunStatus,
)
from ckpt_tasks.registry.best import BestAlias
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.backlog import find_backlog
from ckpt_tasks.training.registry_ids import choose_ids
from ckpt_tasks.training.story import tell_story
from ckpt_tasks.types import CheckpointId, MetricRow, Number

__all__ = ["REFUSALS", "Publisher", "register_checkpoint", "resume_alias"]

_BATCH_ROWS = 1000
_STORY_SECONDS = 60.0
REFUSALS = 3
"""How often a checkpoint is refused before it is set aside for those behind it."""

Row = tuple[str, Number, int, int]


class Publisher:
    """Publishes one attempt.

    Made once the attempt has recorded what it resumed from, as that settles the lineage. Each
    method may raise `RegistryError`, after which it can be called again; and
    `StaleAttemptError` or `StoreError` from the fence, which is asked before anything is
    published.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        fence: Fence,
        registry: Registry,
        config: RegistryConfig,
        description: RunDescription,
        on_event: EventSink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._store = store
        self._layout = layout
        self._fence = fence
        self._registry = registry
        self._config = config
        self._description = description
        self._on_event = on_event
        self._rows: deque[MetricRow] = deque()
        self._commits: deque[CheckpointId] = deque()
        self._ids: RegistryRunIds | None = None
        self._run: RunRecord | None = None
        self._refusals: Counter[CheckpointId] = Counter()
        self._refused_keys: set[str] = set()
        self._registered: dict[str, Registration] = {}
        self._high_water: dict[str, int] = {}
        self._replayed: dict[str, dict[int, float]] = {}
        self._compared = self._diverged = 0
        self._diverged_keys: set[str] = set()
        self._best: BestAlias | None = None
        self._logged: set[str] = set()
        self._resume_age = (0, 0)
        self._open = False
        self._story_due = 0.0

    # -- what happened, from the trainer's events ----------------------------------------------

    def add_rows(self, rows: Sequence[Row]) -> None:
        self._logged.update(key for key, *_ in rows)
        self._rows.extend(
            MetricRow(key, float(value), step, time_ms) for key, value, step, time_ms in rows
        )

    def add_commit(self, checkpoint: str) -> None:
        self._commits.append(CheckpointId.parse(checkpoint))

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._commits) + -(-len(self._rows) // _BATCH_ROWS) + (not self._open)

    # -- publishing ------------------------------------------------------------------------------

    def publish(self) -> None:
        """Do all that waits, in order."""
        if not self._open:
            self._open_run()
        self._send_rows()
        while self._commits:
            if str(self._commits[0]) not in self._registered:
                self._fence.check()
                self._register_or_tell(self._commits[0])
            self._commits.popleft()
        if self._clock() >= self._story_due:
            self._tell()

    def end(self, status: RunStatus) -> None:
        """Give the run its status; everything has been published."""
        self._fence.check()
        self._tell()
        self._registry.end_run(status)
        unmet = self._best.unmet(self._logged) if self._best is not None else None
        if unmet is not None:
            self._on_event(Warned(message=unmet))

    def _tell(self) -> None:
        story = tell_story(self._store, self._layout)
        self._fence.check()
        self._registry.write_note(story)
        self._story_due = self._clock() + _STORY_SECONDS

    def _open_run(self) -> None:
        self._fence.check()
        ids = choose_ids(
            self._store,
            self._layout,
            self._registry,
            self._description,
            lambda message: self._on_event(Warned(message=message)),
        )
        self._registry.open_run(ids, self._description)
        self._on_event(
            RegistryLinked(
                tracking_uri=mask_url(ids.tracking_uri),
                experiment_id=ids.experiment_id,
                run_id=ids.run_id,
                links=self._registry.links(None),
            )
        )
        self._ids = ids
        self._high_water = self._registry.high_water()
        self._registered = self._registry.registered()
        self._catch_up()
        self._open = True

    def _catch_up(self) -> None:
        """Find in the store what is not published, oldest first.

        Of this attempt as well: what it committed while the registry was away is registered now,
        and shows the rows that are sent before.
        """
        assert self._ids is not None
        backlog = find_backlog(
            self._store,
            self._layout,
            run=self._run_record(),
            registered=self._registered,
            high_water=self._high_water,
        )
        self._rows.extendleft(reversed(backlog.rows))
        self._commits = deque(record.checkpoint for record in backlog.missing)
        best = BestAlias(
            self._registry,
            self._config,
            run_id=self._ids.run_id,
            attempt=self._fence.attempt,
        )
        best.exclude(backlog.damaged)
        for record in backlog.registered:
            best.consider(record)
        # Their registrar may have died before it moved the aliases.
        newest = backlog.newest_registered
        if newest is not None:
            self._move_resume_alias(newest, self._registered[newest.id])
        best.move()
        self._best = best

    def _is_new(self, row: MetricRow) -> bool:
        return row.step > self._high_water.get(row.key, -1)

    def _send_rows(self) -> None:
        while self._rows:
            batch = [self._rows[i] for i in range(min(_BATCH_ROWS, len(self._rows)))]
            new = [row for row in batch if self._is_new(row)]
            if new:
                self._fence.check()
                self._send(new)
            self._compare([row for row in batch if not self._is_new(row)])
            for _ in batch:
                self._rows.popleft()
        if self._compared:
            self._on_event(
                MetricsReplayed(
                    compared=self._compared,
                    diverged=self._diverged,
                    keys=sorted(self._diverged_keys),
                )
            )
            self._compared = self._diverged = 0

    def _send(self, rows: Sequence[MetricRow]) -> None:
        """Send rows; those that the registry refuses are searched by halves, told, left out."""
        try:
            self._registry.log_metrics(rows)
        except RegistryRefusedError as error:
            if len(rows) > 1:
                half = len(rows) // 2
                self._send(rows[:half])
                self._send(rows[half:])
                return
            self._check_run()
            if rows[0].key not in self._refused_keys:
                self._refused_keys.add(rows[0].key)
                where = f"step {rows[0].step}"
                self._on_event(
                    Warned(
                        message=f"the registry refuses the metric {rows[0].key!r} of {where}, and "
                        f"perhaps of others; checkpoints keep it: {error}"
                    )
                )

    def _compare(self, replayed: Sequence[MetricRow]) -> None:
        """Steps done again after a resume: compared with what was published, never sent."""
        for row in replayed:
            if row.key not in self._replayed:
                history = self._registry.history(row.key, row.step - 1)
                self._replayed[row.key] = {old.step: old.value for old in history}
            old = self._replayed[row.key].get(row.step)
            if old is None:
                continue
            self._compared += 1
            if old != row.value and not (old != old and row.value != row.value):
                self._diverged += 1
                self._diverged_keys.add(row.key)

    def _register_or_tell(self, checkpoint: CheckpointId) -> None:
        """Register, unless that can never be: then it is told, and blocks no other."""
        try:
            self._register(checkpoint)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            self._on_event(Warned(message=f"{checkpoint} is not registered: {error}"))
        except RegistryRefusedError as error:
            self._refusals[checkpoint] += 1
            if self._refusals[checkpoint] < REFUSALS:
                raise
            self._check_run()
            self._on_event(
                Warned(
                    message=f"{checkpoint} is set aside, for the registry refused it {REFUSALS} "
                    f"times; the next attempt tries it again: {error}"
                )
            )

    def _check_run(self) -> None:
        """Raise `RegistryError` where it is the run that the registry does not take: everything
        would be refused then, and none of it may be set aside.
        """
        assert self._ids is not None
        self._registry.open_run(self._ids, self._description)

    def _register(self, checkpoint: CheckpointId) -> None:
        record, registration = register_checkpoint(
            self._store, self._layout, self._registry, checkpoint, run=self._run_record()
        )
        self._move_resume_alias(record, registration)
        assert self._best is not None
        if self._best.consider(record):
            self._best.move()
        self._registered[record.id] = registration  # last: what fails above is repeated
        self._on_event(
            CheckpointRegistered(
                checkpoint=record.id,
                registered_model=registration.registered_model,
                version=registration.version,
                model_id=registration.model_id,
                links=self._registry.links(registration),
            )
        )

    def _run_record(self) -> RunRecord:
        """With the ancestors whose checkpoints are this run's: a description does not name them."""
        if self._run is None:
            self._run = read_run(self._store, self._layout)
        return self._run

    def _move_resume_alias(self, record: CommitRecord, registration: Registration) -> None:
        """Forwards only: an older checkpoint may be registered late."""
        age = (record.checkpoint.attempt, record.checkpoint.sequence)
        if record.nonfinite or age < self._resume_age:
            return
        self._registry.set_alias(resume_alias(self._layout.run), registration)
        self._resume_age = age


def resume_alias(run: str) -> str:
    """The alias of the checkpoint that a run goes on from."""
    return f"resume-{run}"


def register_checkpoint(
    store: Store, layout: RunLayout, registry: Registry, checkpoint: CheckpointId, *, run: RunRecord
) -> tuple[CommitRecord, Registration]:
    """Register a committed checkpoint, or complete what was left half done.

    Raises
    ------
    CheckpointNotFoundError, CorruptCheckpointError
        Its commit record is gone, or cannot be read.
    """
    path = layout.commit(checkpoint)
    record = read_commit(store, layout, checkpoint, run=run)
    manifest = store.read(path, limit=MAX_RECORD_BYTES)
    uri = f"{store.url.rstrip('/')}/{path}"
    return record, registry.register(record, uri=uri, manifest=manifest)
