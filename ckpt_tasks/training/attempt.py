"""One attempt in this process: claim, recover, train, complete.

This is the trainer's body; `ckpt_tasks.training.trainer` runs it as a process of its own.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

import ckpt_tasks
from ckpt_tasks.checkpointer.catalog import is_complete
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import Drain, InlineDrain
from ckpt_tasks.checkpointer.failures import failure_of
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.marks import read_completed, write_completed
from ckpt_tasks.checkpointer.writer_client import ProcessDrain
from ckpt_tasks.checkpointer.writer_process import WriterSpec
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_tasks.events import AttemptClaimed, AttemptResumed, EventSink, RunFoundComplete, Warned
from ckpt_tasks.fencing.attempts import list_attempts, read_attempts
from ckpt_tasks.fencing.claim import Attempt, ClaimRequest, claim_attempt, open_run, read_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CompletedRecord, IndexRef, RunRecord, now
from ckpt_tasks.recovery.choose import choose
from ckpt_tasks.recovery.recover import Recovered, Start, recover
from ckpt_tasks.schedule.policy import policy_from_config
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.hyperparameters import (
    changed_hyperparameters,
    recorded_hyperparameters,
    trained_with_others,
)
from ckpt_tasks.training.ranked_saver import Ranks
from ckpt_tasks.training.run import TrainingRun
from ckpt_tasks.training.saver import TrainingStopped
from ckpt_tasks.training.spec import AttemptFolder, TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED, Position, Scalar

__all__ = ["AttemptRunner", "find_completed"]


class AttemptRunner:
    """Executes a run once, in this process.

    Parameters
    ----------
    spec
        What to train.
    on_event
        Told what happens.
    folder
        The attempt's folder: with it, saves are written by a process beside this one, if `spec`
        does not say otherwise.
    """

    def __init__(
        self, spec: TrainSpec, on_event: EventSink, folder: AttemptFolder | None = None
    ) -> None:
        self._spec = spec
        self._folder = folder
        self._on_event = on_event
        self._layout = RunLayout(spec.run)
        self._stop_reason: str | None = None
        self._hyperparameters: dict[str, Scalar] = {}
        self.attempt: Attempt | None = None
        self.run: TrainingRun | None = None

    def request_stop(self, reason: str) -> None:
        """Save at the next boundary and stop; from any thread or a signal's handler."""
        self._stop_reason = self._stop_reason or reason
        if self.run is not None:
            self.run.request_stop(reason)

    def execute(self, function: Callable[..., Any]) -> TrainOutcome:
        """Run the attempt to its end.

        Parameters
        ----------
        function
            The training function, called with the `TrainingRun` and the hyperparameters.

        Returns
        -------
        TrainOutcome
            ``done``: trained to the end now, or complete already. ``stopped``: saved and
            stopped as `request_stop` asked.

        Raises
        ------
        CkptTasksError
            As its class says; and whatever the training function raises.
        """
        self._hyperparameters = recorded_hyperparameters(function, self._spec.params)
        store = open_store(self._spec.config.store, for_writing=True)
        try:
            return self._execute(store, function)
        except TrainingStopped as stopped:
            return self._outcome(EXIT_STOPPED, f"saved and stopped: {stopped}")
        finally:
            if self.run is not None:
                self.run.close()
            store.close()

    def _execute(self, store: Store, function: Callable[..., Any]) -> TrainOutcome:
        completed = find_completed(store, self._spec, self._on_event)
        if completed is not None:
            return self._already_complete(store, completed)
        self._stop_if_requested()
        self._check_resume(store)
        identity = open_run(store, self._layout, created_by=f"ckpt-tasks {ckpt_tasks.__version__}")
        attempt = self._claim(store, identity)
        recovered = self._recover(store, identity, attempt)
        self._report_start(store, attempt, recovered)
        run = self._make_run(store, identity, recovered)
        if not run.is_finished:
            self._stop_before_training()
            self._train(run, function)
        return self._finish(store, run, attempt)

    def _train(self, run: TrainingRun, function: Callable[..., Any]) -> None:
        try:
            function(run, **self._spec.params)
        except BaseException:
            # An accelerator that failed gives no values any more: the user's error is the news.
            with contextlib.suppress(Exception):
                run.report()
            raise

    def _stop_if_requested(self) -> None:
        if self._stop_reason is not None:
            raise TrainingStopped(self._stop_reason)

    def _stop_before_training(self) -> None:
        """Nothing has been done since the checkpoint: a step more may outlast the grace."""
        self._stop_if_requested()

    def _already_complete(self, store: Store, completed: CompletedRecord) -> TrainOutcome:
        """Nothing to train; but what was never registered can be, now."""
        identity = read_run(store, self._layout)
        check_not_replica(store, identity)
        newest = max(list_attempts(store, self._layout))
        message = f"was complete already: {completed.position}, at {completed.completed_at}"
        others = trained_with_others(
            self._completed_with(store, completed), self._hyperparameters, completed.checkpoint
        )
        self._on_event(RunFoundComplete(run=self._spec.run, uid=identity.uid, attempt=newest))
        return TrainOutcome(
            code=EXIT_DONE,
            message=f"{message}; {others}" if others else message,
            run=self._spec.run,
            uid=identity.uid,  # not the marker's: it may have been made before the run was adopted
            attempt=completed.attempt,
            position=completed.position,
            checkpoint=completed.checkpoint,
        )

    def _completed_with(self, store: Store, completed: CompletedRecord) -> dict[str, Scalar]:
        """Hyperparameters of the attempt that completed the run; today's where that is damaged."""
        attempts = read_attempts(store, self._layout)
        claims = [a.claim for a in attempts if a.number == completed.attempt and a.claim]
        return claims[0].hyperparameters if claims else self._hyperparameters

    def _check_resume(self, store: Store) -> None:
        """Refuse a checkpoint that is not there while nothing has been claimed.

        Only that: what is started from is chosen after the claim.
        """
        spec = self._spec
        if spec.resume not in ("auto", "fresh"):
            attempts = read_attempts(store, self._layout)
            choose(store, self._layout, attempts, resume=spec.resume, invocation=spec.invocation)

    def _claim(self, store: Store, identity: RunRecord) -> Attempt:
        spec, config = self._spec, self._spec.config.attempt
        request = ClaimRequest(
            invocation=spec.invocation,
            entrypoint=spec.recorded_entrypoint,
            hyperparameters=self._hyperparameters,
            resume=spec.resume,
            tags=spec.tags,
            takeover=spec.takeover,
            takeover_after=config.takeover_after,
            without_commit=config.without_commit,
        )
        attempt = claim_attempt(store, self._layout, identity, request)
        self.attempt = attempt
        self._on_event(
            AttemptClaimed(
                run=spec.run,
                uid=identity.uid,
                attempt=attempt.number,
                invocation=spec.invocation,
                pid=attempt.claim.process.pid,
            )
        )
        return attempt

    def _report_start(self, store: Store, attempt: Attempt, recovered: Recovered) -> None:
        record = recovered.checkpoint.record if recovered.checkpoint else None
        for earlier in attempt.earlier:
            for damage in earlier.damage:
                self._on_event(Warned(message=damage))
        self._on_event(
            AttemptResumed(
                attempt=attempt.number,
                checkpoint=record.id if record else None,
                position=record.position if record else Position(),
                why=recovered.resumed.why,
                lost_steps=self._lost_steps(store, attempt, recovered),
            )
        )
        if record is not None:
            self._warn_of_changes(record.hyperparameters)

    def _warn_of_changes(self, before: Mapping[str, Scalar]) -> None:
        changes = changed_hyperparameters(before, self._hyperparameters)
        if changes is not None:
            self._on_event(Warned(message=changes))

    def _lost_steps(self, store: Store, attempt: Attempt, recovered: Recovered) -> int:
        """Steps that the attempt before this one is known to have done in vain."""
        if not attempt.earlier or recovered.asked_for:
            return 0
        start = recovered.checkpoint.record.position.step if recovered.checkpoint else 0
        beat = read_heartbeat(store, self._layout, attempt.earlier[-1].number)
        return max(0, beat.step - start) if beat is not None and beat.step is not None else 0

    def _recover(self, store: Store, identity: RunRecord, attempt: Attempt) -> Recovered:
        return recover(store, self._layout, identity, attempt, on_event=self._on_event)

    def _make_run(self, store: Store, identity: RunRecord, recovered: Recovered) -> TrainingRun:
        """The run as the training function gets it: what to start from is known and verified."""
        config, number, ranks = self._spec.config, recovered.resumed.attempt, self._ranks()
        run = TrainingRun(
            name=self._spec.run,
            attempt=number,
            checkpointer=Checkpointer(
                self._drain(store, number, recovered.checkpoint),
                identity,
                number,
                recovered.lineage,
                hyperparameters=self._hyperparameters,
                environment=_environment(),
                **self._saves_of_ranks(),
            ),
            schedule=policy_from_config(config.schedule) if ranks is None else ranks.policy,
            ranks=ranks,
            start=recovered.checkpoint,
            # A retry that finds the very checkpoint that was asked for goes on from it likewise.
            asked_for=recovered.resumed.checkpoint == self._spec.resume,
            hyperparameters=self._hyperparameters,
            max_unprotected=config.attempt.max_unprotected,
            grace=config.attempt.grace,
            overlap=config.save.overlap,
            stop_on_error=config.save.on_error == "stop",
            row_blocks=config.save.row_blocks,
            on_event=self._on_event,
        )
        self.run = run
        if self._stop_reason is not None:
            run.request_stop(self._stop_reason)
        return run

    def _ranks(self) -> Ranks | None:
        """What saves need of other ranks, where there are some."""
        return None

    def _saves_of_ranks(self) -> dict[str, Any]:
        """The same, for the `Checkpointer`."""
        return {}

    def _base(self, start: Start) -> IndexRef | None:
        """Names what this rank has saved of the checkpoint that is started from."""
        return start.record.indexes[0] if start.record.world_size == 1 else None

    def _failure_of(self, checkpoint: str) -> str | None:
        """Why a rank's part of it will not come, once that is known."""
        return None if self._folder is None else failure_of(self._folder.failures, checkpoint)

    def _drain(self, store: Store, attempt: int, start: Start | None) -> Drain:
        """What writes saves: a process of its own, but for a store that only this one sees."""
        folder, config = self._folder, self._spec.config.save
        base = self._base(start) if start is not None else None
        if folder is None or not config.asynchronous or not store.is_shared:
            return InlineDrain(
                JobRunner(
                    store,
                    self._layout,
                    Fence(store, self._layout, attempt),
                    incremental=config.incremental,
                    base=base,
                    failure=self._failure_of,
                )
            )
        writer = WriterSpec(
            run=self._spec.run,
            attempt=attempt,
            store=self._spec.config.store,
            conditional_create=store.supports_conditional_create,
            incremental=config.incremental,
            base=base,
            events=str(folder.writer_events),
            failures=str(folder.failures),
        )
        return ProcessDrain(writer, folder.write_writer)

    def _finish(self, store: Store, run: TrainingRun, attempt: Attempt) -> TrainOutcome:
        run.finish()
        fence = Fence(store, self._layout, attempt.number)
        fence.wait(seconds=self._spec.config.attempt.grace)
        write_completed(
            store,
            self._layout,
            CompletedRecord(
                uid=attempt.claim.uid,
                attempt=attempt.number,
                checkpoint=run.checkpoint,
                position=run.position,
                completed_at=now(),
            ),
        )
        return self._outcome(EXIT_DONE, f"trained to its end: {run.position}")

    def _outcome(self, code: int, message: str) -> TrainOutcome:
        return TrainOutcome(code=code, message=message, **self._reached())

    def _reached(self) -> dict[str, Any]:
        """How far this attempt came, as outcomes say it."""
        run, attempt = self.run, self.attempt
        return {
            "run": self._spec.run,
            "uid": attempt.claim.uid if attempt else None,
            "attempt": attempt.number if attempt else None,
            "position": run.position if run else None,
            "checkpoint": run.checkpoint if run else None,
        }

    def failure(self, error: Exception) -> TrainOutcome:
        """What an exception out of `execute` means for the one who decides about a retry."""
        return TrainOutcome.failure(error, **self._reached())


def find_completed(store: Store, spec: TrainSpec, on_event: EventSink) -> CompletedRecord | None:
    """The marker of a run that is complete, unless something else than ``auto`` was asked for."""
    layout = RunLayout(spec.run)
    try:
        read_run(store, layout)
        completed = read_completed(store, layout)
    except CheckpointNotFoundError:
        return None
    except CorruptCheckpointError as error:
        on_event(Warned(message=f"{error}; the run counts as not complete"))
        return None
    if completed is None:
        return None
    attempts = read_attempts(store, layout)
    mine = any(a.claim is not None and a.claim.invocation == spec.invocation for a in attempts)
    if spec.resume != "auto" and not mine:
        return None
    return completed if is_complete(completed, attempts) else None


def _environment() -> dict[str, str]:
    return {
        "ckpt_tasks": ckpt_tasks.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "host": this_process().host,
    }
