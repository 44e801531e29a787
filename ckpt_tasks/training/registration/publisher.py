"""Publishing an attempt to a registry: what is committed gets registered, metrics once.

Nothing here is urgent and nothing is lost: work waits in a queue while the registry is away, and
what a dead registrar left undone is found again from the store by the next one.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

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
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES, read_attempts
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
from ckpt_tasks.registry.best import BEST, BestAlias
from ckpt_tasks.replay import Replay
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.registration.backlog import find_backlog
from ckpt_tasks.training.registration.metric_queue import BATCH_ROWS, MetricQueue
from ckpt_tasks.training.registration.promotions import LostPromotions
from ckpt_tasks.training.registration.registry_ids import choose_ids
from ckpt_tasks.training.registration.story import read_replays, tell_replays, tell_story
from ckpt_tasks.training.registration.tail import first_values, read_tails, write_tail
from ckpt_tasks.types import CheckpointId, MetricRow, Number

__all__ = ["REFUSALS", "Publisher", "register_checkpoint", "resume_alias"]

_STORY_SECONDS = 60.0
REPLAY_TAG = "replay"
REFUSALS = 3
"""How often a checkpoint is refused before it is set aside for those behind it."""

Row = tuple[str, Number, int, int]

BoundsKeeper = Callable[[Mapping[str, int]], Mapping[str, int]]
"""Given the highest step of each metric, returns those that it was given first in this attempt."""


class Publisher:
    """Publishes one attempt.

    Made once the attempt has recorded what it resumed from, as that settles the lineage. Each
    method may raise `RegistryError`, after which it can be called again; and
    `StaleAttemptError` or `StoreError` from the fence, which is asked right before each single
    thing is published: an attempt that was stopped for a while does at most what it stood in.
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
        bounds: BoundsKeeper = dict,
        tails_after: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tails_after = tails_after
        self._bounds = bounds
        self._clock = clock
        self._store = store
        self._layout = layout
        self._fence = fence
        self._registry = registry
        self._config = config
        self._description = description
        self._on_event = on_event
        self._metrics = MetricQueue(
            registry, fence, on_event, self._check_run, live=config.metrics == "live"
        )
        self._kept = 0  # rows of the attempt's tail in the store
        self._commits: deque[CheckpointId] = deque()
        self._caught_up: set[CheckpointId] = set()
        self._ids: RegistryRunIds | None = None
        self._run: RunRecord | None = None
        self._refusals: Counter[CheckpointId] = Counter()
        self._registered: dict[str, Registration] = {}
        self._promotions = LostPromotions(store, layout, registry, fence, on_event)
        self._told_replay = False
        self._best: BestAlias | None = None
        self._logged: set[str] = set()
        self._resume_age = (0, 0)
        self._open = False
        self._story_due = 0.0

    # -- what happened, from the trainer's events ----------------------------------------------

    def add_rows(self, rows: Sequence[Row]) -> None:
        self._logged.update(key for key, *_ in rows)
        self._metrics.add(
            MetricRow(key, float(value), step, time_ms) for key, value, step, time_ms in rows
        )

    def add_save(self, checkpoint: str) -> None:
        self._metrics.add_save(checkpoint)

    def add_commit(self, checkpoint: str) -> None:
        self._metrics.release(checkpoint)
        self._commits.append(CheckpointId.parse(checkpoint))

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._commits) + -(-len(self._metrics) // BATCH_ROWS) + (not self._open)

    # -- publishing ------------------------------------------------------------------------------

    def publish(self) -> None:
        """Do all that waits, in order."""
        if not self._open:
            self._open_run()
        self._metrics.send()
        self._tell_replay(ended=False)
        while self._commits:
            if str(self._commits[0]) not in self._registered:
                self._register_or_tell(self._commits[0])
            self._commits.popleft()
        if self._clock() >= self._story_due:
            self._tell()

    def settle(self, status: RunStatus) -> None:
        """The attempt has ended: what is to be published only if no other goes on is kept."""
        if status == "finished":
            self._metrics.release_all()
        self._keep(self._metrics.tail)

    def keep_unsent(self) -> None:
        """The attempt has ended, and the registry is away: what checkpoints do not hold is kept
        for `reconcile`.
        """
        self._keep(self._metrics.unsent)

    def _keep(self, rows: Sequence[MetricRow]) -> None:
        if len(rows) > self._kept:
            write_tail(self._store, self._layout, self._fence.attempt, rows)
            self._kept = len(rows)

    def end(self, status: RunStatus) -> None:
        """Give the run its status; everything has been published."""
        self._tell_replay(ended=True)
        self._tell()
        self._fence.check()
        self._registry.end_run(status)
        unmet = self._best.unmet(self._logged) if self._best is not None else None
        if unmet is not None:
            self._on_event(Warned(message=unmet))

    def _tell(self) -> None:
        replays = self._replays()
        story = tell_story(self._store, self._layout, replays)
        self._fence.check()
        self._registry.write_note(story)
        if replays:
            self._fence.check()
            self._registry.write_tag(REPLAY_TAG, tell_replays(replays))
        self._story_due = self._clock() + _STORY_SECONDS

    def _replays(self) -> dict[int, Replay]:
        attempts = read_attempts(self._store, self._layout)
        replays = read_replays(self._store, self._layout, attempts)
        if self._told_replay:  # the heartbeat has perhaps not told it yet
            replays[self._fence.attempt] = self._metrics.replay
        return replays

    def _open_run(self) -> None:
        ids = choose_ids(
            self._store,
            self._layout,
            self._registry,
            self._description,
            self._fence,
            lambda message: self._on_event(Warned(message=message)),
        )
        self._fence.check()
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
        self._registered = self._registry.registered()
        self._catch_up()
        self._open = True

    def _catch_up(self) -> None:
        """Find in the store what is not published, oldest first.

        Of this attempt as well: what it committed while the registry was away is registered now,
        and shows the rows that are sent before.
        """
        assert self._ids is not None
        high_water = self._registry.high_water()
        backlog = find_backlog(
            self._store,
            self._layout,
            run=self._run_record(),
            registered=self._registered,
            high_water=high_water,
            tails_after=self._tails_after,
        )
        bounds, unsent = self._bounds(high_water), self._unsent()
        models = {one: held.model_id for one, held in self._registered.items()}
        self._promotions.find({**models, **{record.id: None for record in backlog.missing}})
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
        self._move_best_alias(best)
        self._best = best
        for record in backlog.registered:
            self._promotions.bring_back(record.id, self._registered[record.id])
        # Last: what fails above is repeated, and would queue all of it once more.
        self._metrics.open(high_water, bounds, backlog.rows, unsent)
        self._commits = deque(record.checkpoint for record in backlog.missing)
        self._caught_up = set(self._commits)

    def _unsent(self) -> Mapping[tuple[str, int], MetricRow]:
        """What earlier attempts have left unsent of the steps that this one does again."""
        if self._config.metrics == "live":
            return {}
        attempts = read_attempts(self._store, self._layout)
        earlier = [one for one in attempts if one.number < self._fence.attempt]
        own = [one.resumed for one in attempts if one.number == self._fence.attempt]
        start = own[0].checkpoint if own and own[0] is not None else None
        behind = CheckpointId.parse(start) if start is not None else None
        return first_values(read_tails(self._store, self._layout, earlier, behind=behind))

    def _tell_replay(self, *, ended: bool) -> None:
        """Once, when the steps that were done again are behind, or the attempt is."""
        if self._told_replay or not (ended or self._metrics.has_passed):
            return
        replay = self._metrics.replay
        if not replay.steps:
            return
        self._told_replay = True
        attempt = self._fence.attempt
        self._on_event(MetricsReplayed(run=self._layout.run, attempt=attempt, replay=replay))
        self._story_due = self._clock()

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
        self._fence.check()
        self._registry.open_run(self._ids, self._description)

    def _register(self, checkpoint: CheckpointId) -> None:
        record, registration = register_checkpoint(
            self._store,
            self._layout,
            self._registry,
            checkpoint,
            run=self._run_record(),
            fence=self._fence,
        )
        if checkpoint in self._caught_up or not self._others_are_ahead(checkpoint):
            self._move_resume_alias(record, registration)
        assert self._best is not None
        if self._best.consider(record):
            self._move_best_alias(self._best)
        self._promotions.bring_back(record.id, registration)
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

    def _others_are_ahead(self, checkpoint: CheckpointId) -> bool:
        """Whether `reconcile` has told of a later checkpoint of this attempt, which seemed dead."""
        assert self._ids is not None
        held = self._registry.alias_holder(resume_alias(self._layout.run), "step")
        if held is None or held.run_id != self._ids.run_id or held.checkpoint is None:
            return False
        try:
            ahead = CheckpointId.parse(held.checkpoint)
        except ValueError:  # people may write anything there
            return False
        return ahead.attempt == checkpoint.attempt and ahead.sequence > checkpoint.sequence

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
        self._fence.check()
        self._registry.set_alias(resume_alias(self._layout.run), registration)
        self._resume_age = age

    def _move_best_alias(self, best: BestAlias) -> None:
        due = best.due()
        if due is not None:
            self._fence.check()
            self._registry.set_alias(BEST, due)


def resume_alias(run: str) -> str:
    """The alias of the checkpoint that a run goes on from."""
    return f"resume-{run}"


def register_checkpoint(
    store: Store,
    layout: RunLayout,
    registry: Registry,
    checkpoint: CheckpointId,
    *,
    run: RunRecord,
    fence: Fence,
) -> tuple[CommitRecord, Registration]:
    """Register a committed checkpoint, or complete what was left half done.

    Parameters
    ----------
    fence
        Of the attempt in whose name it is done.

    Raises
    ------
    CheckpointNotFoundError, CorruptCheckpointError
        Its commit record is gone, or cannot be read.
    StaleAttemptError
        A later attempt owns the run.
    """
    path = layout.commit(checkpoint)
    record = read_commit(store, layout, checkpoint, run=run)
    manifest = store.read(path, limit=MAX_RECORD_BYTES)
    uri = f"{store.url.rstrip('/')}/{path}"
    fence.check()
    return record, registry.register(record, uri=uri, manifest=manifest)
