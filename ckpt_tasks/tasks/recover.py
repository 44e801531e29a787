"""Step 2: report what a retry would start from. The train step picks again, after its claim."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.recovery.recover import preview_recovery
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["RecoveryReport", "recover"]


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where training would start, as the store stood when this was made.

    Parameters
    ----------
    attempts
        How many were claimed so far.
    complete
        Nothing is left to train.
    checkpoint, step
        What a retry would start from, every byte verified; ``None`` and 0 for the beginning.
    restorable
        False: checkpoints were committed, and none can be restored.
    why
        One sentence.
    passed_over
        Newer checkpoints that would not be used, each with its reason.
    """

    run: str
    attempts: int
    complete: bool
    checkpoint: str | None
    step: int
    restorable: bool
    why: str
    passed_over: list[str]

    def __str__(self) -> str:
        if self.complete:
            return f"run {self.run!r} is complete already"
        if not self.restorable:
            return f"run {self.run!r} cannot be resumed: {self.why}"
        start = f"step {self.step}, {self.checkpoint}" if self.checkpoint else "the beginning"
        return f"attempt {self.attempts + 1} of run {self.run!r} would start from {start}"


def recover(spec: TrainSpec) -> RecoveryReport:
    """Look, verify, change nothing.

    Raises
    ------
    StoreError
        Storage did not answer.
    ConfigError
        The run's own record is damaged.
    """
    store = open_store(spec.config.store)
    try:
        return _report(store, spec)
    finally:
        store.close()


def _report(store: Store, spec: TrainSpec) -> RecoveryReport:
    try:
        view = view_run(store, spec.run)
    except CheckpointNotFoundError:
        # Only the beginning can be had of a run that has not begun.
        possible = spec.resume in ("auto", "fresh")
        why = "there is no such run yet"
        return _start(spec, attempts=0, why=why, restorable=possible)
    attempts = len(view.attempts)
    if view.completed is not None and spec.resume == "auto":
        return RecoveryReport(
            run=spec.run,
            attempts=attempts,
            complete=True,
            checkpoint=view.completed.checkpoint,
            step=view.completed.position.step,
            restorable=True,
            why="the run has its completion marker",
            passed_over=[],
        )
    try:
        preview = preview_recovery(
            store,
            RunLayout(spec.run),
            view.run,
            view.attempts,
            resume=spec.resume,
            invocation=spec.invocation,
        )
    except CheckpointNotFoundError as error:
        return _start(spec, attempts=attempts, why=str(error), restorable=False)
    return RecoveryReport(
        run=spec.run,
        attempts=attempts,
        complete=False,
        checkpoint=preview.checkpoint,
        step=preview.step,
        restorable=True,
        why=preview.why,
        passed_over=[f"{passed.checkpoint}: {passed.why}" for passed in preview.passed_over],
    )


def _start(spec: TrainSpec, *, attempts: int, why: str, restorable: bool = True) -> RecoveryReport:
    return RecoveryReport(
        run=spec.run,
        attempts=attempts,
        complete=False,
        checkpoint=None,
        step=0,
        restorable=restorable,
        why=why,
        passed_over=[],
    )
