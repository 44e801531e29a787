"""The `Checkpointer`: turns captured state into a committed checkpoint of one attempt."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.commit import commit, new_write_id
from ckpt_tasks.checkpointer.image import Planner
from ckpt_tasks.checkpointer.staged import StagedState
from ckpt_tasks.checkpointer.writer import write_rank
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import Lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RunRecord, now
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId, Number, Position, SaveDecision, Scalar

__all__ = ["Checkpointer", "SaveRequest"]


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a save besides the state itself.

    Parameters
    ----------
    metrics
        Values logged for the step of `position`, inside it or behind it; no older ones.
    rows
        Metric rows logged since the attempt's previous checkpoint.
    nonfinite
        Names of parameters that hold NaN or infinity.
    exact
        False where random numbers drawn inside loader workers are not restored.
    capture_seconds
        How long capturing the state took.
    """

    position: Position
    decision: SaveDecision
    metrics: Mapping[str, Number] = {}
    rows: Sequence[tuple[str, Number, int, int]] = ()
    nonfinite: Sequence[str] = ()
    exact: bool = True
    capture_seconds: float = 0.0


class Checkpointer:
    """Writes and commits the checkpoints of one attempt, one after the other.

    Parameters
    ----------
    lineage
        The attempt's own: it first, then what it resumed from.
    hyperparameters
        Flattened and masked.
    environment
        Versions and host, for people who compare checkpoints.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        run: RunRecord,
        fence: Fence,
        lineage: Lineage,
        *,
        hyperparameters: Mapping[str, Scalar],
        environment: Mapping[str, str],
        unique: Callable[[], str] = lambda: uuid.uuid4().hex[:12],
    ) -> None:
        self._store = store
        self._layout = layout
        self._run = run
        self._fence = fence
        self._lineage = lineage
        self._hyperparameters = dict(hyperparameters)
        self._environment = dict(environment)
        self._unique = unique
        self._sequence = 0
        self._arena = Arena()
        self._planner = Planner()

    def next_id(self, position: Position) -> CheckpointId:
        """The id that the next save will have."""
        return CheckpointId(position.step, self._fence.attempt, self._sequence + 1)

    def prepare(self, state: StagedState) -> None:
        """Get ready for saves of states like this one, in the background."""
        self._arena.prepare(self._planner.plan(state).size)

    def save(self, state: StagedState, request: SaveRequest) -> CommitRecord:
        """Write `state` and commit it; when this returns, the checkpoint exists.

        Raises
        ------
        StaleAttemptError
            A later attempt owns the run.
        ConfigError
            Hyperparameters and metrics are too large for the commit record.
        StoreError
            Storage failed; the attempt may go on and save again.
        """
        checkpoint = self.next_id(request.position)
        self._sequence = checkpoint.sequence  # never reused, whatever becomes of this save
        write_id = new_write_id(checkpoint.attempt, checkpoint.sequence, self._unique())
        started = time.perf_counter()
        image = self._planner.plan(state)
        memory = self._arena.reserve(image.size)
        image.fill(memory, state)
        staged = time.perf_counter()
        written = write_rank(
            self._store,
            self._layout,
            image,
            memory,
            state.trees,
            write_id=write_id,
            metrics=request.rows,
        )
        record = CommitRecord(
            uid=self._run.uid,
            id=str(checkpoint),
            write_id=write_id,
            position=request.position,
            lineage=list(self._lineage.entries),
            hyperparameters=self._hyperparameters,
            metrics=dict(request.metrics),
            trigger=request.decision.trigger,
            reason=request.decision.reason,
            timings={
                "capture": request.capture_seconds,
                "stage": staged - started,
                "write": time.perf_counter() - staged,
            },
            environment=self._environment,
            world_size=1,
            size=written.size,
            indexes=[written.ref],
            nonfinite=list(request.nonfinite)[:20],
            exact=request.exact,
            created_at=now(),
        )
        commit(self._store, self._layout, self._fence, record, [written.index])
        return record
