"""The proof: a run that was killed ends with the very state of one that never was."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.checkpointer.verify import state_digest
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.demo.stage import KILLS, RUN, Stage
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["prove", "train_uninterrupted"]


def train_uninterrupted(stage: Stage) -> str:
    """Train without any orchestrator or kill; returns the digest of the final state.

    Raises
    ------
    CkptTasksError
        The training failed.
    """
    spec = TrainSpec(
        entrypoint="ckpt_tasks.demo.digits:train",
        run="uninterrupted",
        invocation="demo-reference",
        config=CheckpointConfig(
            store=StoreConfig(url=stage.store_url), schedule=ScheduleConfig(final=True)
        ),
    )
    outcome = launch(spec)
    if not outcome.done:
        raise CkptTasksError(f"the uninterrupted training failed: {outcome.message}")
    stage.account.say("train", outcome.message)
    return _digest(stage, spec.run)


def prove(stage: Stage, expected: str, killed: Sequence[int]) -> bool:
    """Tell how the attempts followed one another, and compare the states they ended with.

    Parameters
    ----------
    expected
        Digest of the uninterrupted training's final state.
    killed
        Numbers of the attempts that were killed.
    """
    say = stage.account.say
    actual = _digest(stage, RUN)
    with open_store(stage.store_url) as store:
        view = view_run(store, RUN)
    for line in _attempt_lines(view, killed):
        say("", line)
    say("", f"{stage.account.registered} checkpoints registered in MLflow")
    say("", f"final state, never killed:   {expected}")
    say("", f"final state, killed {len(killed)} times: {actual}")
    holds = expected == actual and len(killed) == KILLS
    say("", "IDENTICAL, bit for bit." if holds else "THEY DIFFER.")
    return holds


def _digest(stage: Stage, run: str) -> str:
    with open_store(stage.store_url) as store:
        newest = view_run(store, run).newest
        if newest is None:
            raise CkptTasksError(f"run {run!r} has no checkpoint in {stage.store_url}")
        return state_digest(store, run, newest.id)


def _attempt_lines(view: RunView, killed: Sequence[int]) -> list[str]:
    lines = []
    for attempt in view.attempts:
        start = attempt.resumed.checkpoint if attempt.resumed else None
        end = "killed" if attempt.number in killed else "trained to the end"
        lines.append(f"attempt {attempt.number}: from {start or 'the beginning'}, {end}")
    return lines
