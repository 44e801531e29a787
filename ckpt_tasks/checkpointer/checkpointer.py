"""The `Checkpointer`: turns captured state into committed checkpoints of one attempt.

A save is *staged* (copied into the arena, while training waits), *handed over*, and then *drained*
(written and committed, while training goes on). One is in flight at a time. What need not hold
training up, such as the search for NaN in what was staged, is done by a thread before the
hand-over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import msgspec

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.commit import new_write_id
from ckpt_tasks.checkpointer.drain import Drain, WriterDiedError
from ckpt_tasks.checkpointer.image import Planner
from ckpt_tasks.checkpointer.job import NAMED_PARAMETERS, SaveJob
from ckpt_tasks.checkpointer.staged import StagedState
from ckpt_tasks.errors import StoreError
from ckpt_tasks.fencing.lineage import Lineage
from ckpt_tasks.format.records import CommitRecord, RunRecord
from ckpt_tasks.types import CheckpointId, Number, Position, SaveDecision, Scalar

__all__ = ["Checkpointer", "SaveRequest"]

_WAIT_SECONDS = 1.0
_MAX_DEATHS = 3  # of writers, before a save has failed


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a save besides the state itself.

    Parameters
    ----------
    metrics
        Values logged for the step of `position`, inside it or behind it; no older ones.
    rows
        Metric rows logged since the attempt's previous checkpoint.
    exact
        False where random numbers drawn inside loader workers are not restored.
    capture_seconds
        How long capturing the state took.
    number
        Of the save in the attempt, as ranks have agreed on it; default: the next one.
    whole
        Every byte is written, whatever earlier checkpoints hold.
    """

    position: Position
    decision: SaveDecision
    metrics: Mapping[str, Number] = {}
    rows: Sequence[tuple[str, Number, int, int]] = ()
    exact: bool = True
    capture_seconds: float = 0.0
    number: int | None = None
    whole: bool = False


class Checkpointer:
    """Saves the checkpoints of one attempt, one after the other.

    Parameters
    ----------
    drain
        Writes and commits what is staged.
    attempt
        Whose checkpoints they are.
    lineage
        The attempt's own: it first, then what it resumed from.
    hyperparameters
        Flattened and masked.
    environment
        Versions and host, for people who compare checkpoints.
    unique
        Gives the part of a write's name that no other write has; of several ranks, the same on
        all of them (see `training.ranks.agreement.RankAgreement.nonce`).
    rank, world_size
        Of this process.
    gather_seconds
        How long rank 0 waits for the others' parts of a save.
    """

    def __init__(
        self,
        drain: Drain,
        run: RunRecord,
        attempt: int,
        lineage: Lineage,
        *,
        hyperparameters: Mapping[str, Scalar],
        environment: Mapping[str, str],
        unique: Callable[[], str] = lambda: uuid.uuid4().hex[:12],
        rank: int = 0,
        world_size: int = 1,
        gather_seconds: float = 600.0,
    ) -> None:
        self._drain = drain
        self._run = run
        self._attempt = attempt
        self._lineage = lineage
        self._hyperparameters = dict(hyperparameters)
        self._environment = dict(environment)
        self._unique = unique
        self._rank = rank
        self._world_size = world_size
        self._gather_seconds = gather_seconds
        self._sequence = 0
        self._arena = Arena(has_file=drain.is_concurrent)
        self._planner = Planner()
        self._in_flight: _InFlight | None = None
        self._handing_over = ThreadPoolExecutor(1, thread_name_prefix="hand-over")

    @property
    def tells_commits(self) -> bool:
        """Whoever commits tells of it; else the caller has to."""
        return self._drain.is_concurrent

    @property
    def in_flight(self) -> CheckpointId | None:
        """The checkpoint that is being written."""
        return self._in_flight.checkpoint if self._in_flight is not None else None

    def next_id(self, position: Position, number: int | None = None) -> CheckpointId:
        """The id that the next save, or that of an agreed `number`, will have."""
        return CheckpointId(position.step, self._attempt, number or self._sequence + 1)

    def prepare(self, state: StagedState) -> None:
        """Get ready for saves of states like this one, in the background."""
        self._arena.prepare(self._planner.plan(state).size)
        self._drain.prepare(self._arena)

    def begin(self, state: StagedState, request: SaveRequest) -> None:
        """Stage `state` and hand it over; when this returns, training may go on.

        None may be in flight. How it ends is told by `poll`.

        Raises
        ------
        StoreError
            There is no memory for it, or nobody to write it.
        """
        assert self._in_flight is None, f"{self.in_flight} is still being written"
        checkpoint = self._take_id(request.position, request.number)
        started = time.perf_counter()
        image = self._planner.plan(state)
        memory = self._arena.reserve(image.size)
        image.fill(memory, state)
        staged = time.perf_counter() - started
        draft = CommitRecord(
            uid=self._run.uid,
            id=str(checkpoint),
            write_id=self._new_write_id(checkpoint),
            position=request.position,
            lineage=list(self._lineage.entries),
            hyperparameters=self._hyperparameters,
            metrics=dict(request.metrics),
            trigger=request.decision.trigger,
            reason=request.decision.reason,
            timings={"capture": request.capture_seconds, "stage": staged},
            environment=self._environment,
            world_size=self._world_size,
            size=0,
            indexes=[],
            exact=request.exact,
            created_at="",
        )
        seconds = request.capture_seconds + staged

        def hand_over() -> SaveJob:
            waited = state.finish_copy(memory, image.offsets)
            bad = state.find_nonfinite(memory, image.offsets)[:NAMED_PARAMETERS]
            job = SaveJob(
                image=self._planner.encoded,
                trees=msgspec.Raw(msgspec.msgpack.encode(state.trees)),
                rows=list(request.rows),
                draft=msgspec.structs.replace(draft, nonfinite=bad),
                seconds=seconds + waited,
                rank=self._rank,
                shared=list(state.shared),
                row_blocks=list(state.row_blocks),
                gather_seconds=self._gather_seconds,
                whole=request.whole,
            )
            self._drain.hand_over(job, self._arena, image.size)
            return job

        handed = self._submit(hand_over)
        self._in_flight = _InFlight(checkpoint, handed, image.size)

    def poll(self, timeout: float = 0.0) -> CommitRecord | None:
        """How the save in flight has ended.

        A writer that died is replaced, and the save repeated from what is staged, as another
        checkpoint of the same position: what the dead one had begun may yet turn out to exist.

        Parameters
        ----------
        timeout
            Seconds to wait for its end.

        Returns
        -------
        CommitRecord or None
            ``None`` while it goes on.

        Raises
        ------
        TornStateError
            The state changed while it was copied.
        StaleAttemptError
            A later attempt owns the run.
        ConfigError
            Hyperparameters and metrics are too large for the commit record.
        StoreError
            Storage failed; the attempt may go on and save again.
        """
        flight = self._in_flight
        assert flight is not None, "nothing is being written"
        deadline = time.perf_counter() + timeout
        try:
            job = flight.job.result(timeout)
            record = self._drain.poll(max(0.0, deadline - time.perf_counter()))
        except TimeoutError:
            return None
        except WriterDiedError as error:
            self._repeat(flight, job, error)
            return None
        except BaseException:
            self._in_flight = None
            raise
        if record is not None:
            self._in_flight = None
        return record

    def give_up(self) -> None:
        """End the save in flight, which takes too long; its memory may be used again."""
        if self._in_flight is not None:
            # Else it would be handed over yet, from memory that others use.
            wait([self._in_flight.job])
        self._drain.stop()
        self._in_flight = None

    def save(self, state: StagedState, request: SaveRequest) -> CommitRecord:
        """`begin`, and wait: when this returns, the checkpoint exists. Errors as both."""
        self.begin(state, request)
        while (record := self.poll(_WAIT_SECONDS)) is None:
            pass
        return record

    def close(self) -> None:
        """No more saves will come; one in flight goes on where another process writes it."""
        self._handing_over.shutdown()
        self._drain.close()
        if self._in_flight is None:
            self._arena.close()

    def _take_id(self, position: Position, number: int | None = None) -> CheckpointId:
        checkpoint = self.next_id(position, number)
        assert checkpoint.sequence > self._sequence, f"number {number} was used already"
        self._sequence = checkpoint.sequence  # never reused, whatever becomes of this save
        return checkpoint

    def _new_write_id(self, checkpoint: CheckpointId) -> str:
        return new_write_id(checkpoint.attempt, checkpoint.sequence, self._unique())

    def _repeat(self, flight: _InFlight, job: SaveJob, died: WriterDiedError) -> None:
        """Hand the same image over to a new writer."""
        self._in_flight = None
        if self._world_size > 1:
            # The other ranks write under the name that was agreed, and would not know another.
            raise StoreError(f"the process that wrote {flight.checkpoint} {died}") from died
        if flight.deaths + 1 >= _MAX_DEATHS:
            raise StoreError(
                f"the process that wrote {flight.checkpoint} {died}, like the {_MAX_DEATHS - 1} "
                "before it"
            ) from died
        checkpoint = self._take_id(job.draft.position)
        again = job.renamed(str(checkpoint), self._new_write_id(checkpoint))
        self._drain.hand_over(again, self._arena, flight.size)
        self._in_flight = _InFlight(checkpoint, _done(again), flight.size, flight.deaths + 1)

    def _submit(self, hand_over: Callable[[], SaveJob]) -> Future[SaveJob]:
        """Have it done by a thread, where training can go on meanwhile."""
        if self._drain.is_concurrent:
            return self._handing_over.submit(hand_over)
        return _done(hand_over())


def _done(job: SaveJob) -> Future[SaveJob]:
    future: Future[SaveJob] = Future()
    future.set_result(job)
    return future


class _InFlight(msgspec.Struct, frozen=True):
    """A checkpoint that is being written, its job once that is handed over, the bytes of its
    image, and how many writers have died of it.
    """

    checkpoint: CheckpointId
    job: Future[SaveJob]
    size: int
    deaths: int = 0
