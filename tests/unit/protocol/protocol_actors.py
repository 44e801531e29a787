"""Real attempts as actors, and the promises read from what they leave in the store.

An attempt claims, recovers, registers what it goes on from, and saves. Its whole state is a list:
which attempt trained each step. The registry is a folder of the same store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.fencing import (
    ClaimRequest,
    Fence,
    claim_attempt,
    open_run,
    read_attempts,
    read_run,
    trace_lineage,
)
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.recovery.recover import recover
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing.interleave import Actor, Interleaving
from ckpt_tasks.types import CheckpointId, Position, SaveDecision

LAYOUT = RunLayout("run")
REGISTRY = "registry/"
UNSEEN = (LAYOUT.data,)
"""Data lies under a write-id that only the commit record tells."""

DECISION = SaveDecision(trigger="steps", reason="every step")


@dataclass
class History:
    """A training's whole state: the attempt that trained each step."""

    attempts: list[int] = field(default_factory=list)

    @property
    def trees(self) -> Mapping[str, Any]:
        return {"loop": {"history": self.attempts}}

    tensors: Sequence[Any] = ()
    row_blocks: Sequence[Any] = ()
    shared: Sequence[Any] = ()

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        assert not self.tensors
        assert not offsets

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        return 0.0

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        return []


def empty_store() -> MemoryStore:
    """A store that holds the run's identity and nothing else."""
    store = MemoryStore("protocol")
    for info in store.list_objects(""):
        store.delete(info.path)
    open_run(store, LAYOUT, created_by="test")
    return store


def attempt(saves: int) -> Actor:
    """One attempt that trains and saves `saves` steps."""

    def train(store: Store) -> list[int]:
        run = read_run(store, LAYOUT)
        request = ClaimRequest(invocation="test", entrypoint="test:train", hyperparameters={})
        claimed = claim_attempt(store, LAYOUT, run, request)
        recovered = recover(store, LAYOUT, run, claimed)
        fence = Fence(store, LAYOUT, claimed.number)
        history = History()
        if recovered.checkpoint is not None:
            history = History(list(recovered.checkpoint.trees["loop"]["history"]))
            fence.check()
            register(store, recovered.checkpoint.record.checkpoint)
        checkpointer = Checkpointer(
            InlineDrain(JobRunner(store, LAYOUT, fence, incremental=False)),
            run,
            claimed.number,
            recovered.lineage,
            hyperparameters={},
            environment={},
        )
        for _ in range(saves):
            history.attempts.append(claimed.number)
            position = Position(step=len(history.attempts))
            request = SaveRequest(position=position, decision=DECISION)
            checkpoint = checkpointer.save(history, request).checkpoint
            fence.check()  # as the registrar does: a save may end with the fence unreachable
            register(store, checkpoint)
        return history.attempts

    return train


def register(store: Store, checkpoint: CheckpointId) -> None:
    store.put(f"{REGISTRY}{checkpoint}", b"")


def history_of(store: Store, checkpoint: CheckpointId) -> list[int]:
    record = read_commit(store, LAYOUT, checkpoint)
    return list(load_checkpoint(store, LAYOUT, record).trees["loop"]["history"])


def check_promises(store: Store, run: Interleaving) -> None:
    """Assert the protocol's promises on the store after a run, and on the run itself."""
    committed = list_checkpoints(store, LAYOUT)
    names = [info.path.removeprefix(REGISTRY) for info in store.list_objects(REGISTRY)]
    registered = [CheckpointId.parse(name) for name in names]
    histories = {checkpoint: history_of(store, checkpoint) for checkpoint in committed}

    assert set(registered) <= set(committed), "something is registered that is not committed"
    for checkpoint, history in histories.items():
        assert len(history) == checkpoint.step, f"{checkpoint} skips or repeats a step: {history}"
        assert history == _told_by_lineage(store, checkpoint)
    _assert_one_history([histories[checkpoint] for checkpoint in registered])
    _assert_no_silent_restart(store, run)
    _assert_stale_attempts_leave_all_as_it_is(run)

    valid = trace_lineage(read_attempts(store, LAYOUT)).valid(committed)
    _assert_one_history([histories[checkpoint] for checkpoint in valid])
    goes_on = attempt(1)(store)
    for checkpoint in registered:
        assert goes_on[: checkpoint.step] == histories[checkpoint], "a retry lost registered work"


def _told_by_lineage(store: Store, checkpoint: CheckpointId) -> list[int]:
    told: list[int] = []
    end = checkpoint.step
    for entry in read_commit(store, LAYOUT, checkpoint).lineage:
        start = CheckpointId.parse(entry.resumed_from).step if entry.resumed_from else 0
        told = [entry.attempt] * (end - start) + told
        end = start
    return told


def _assert_one_history(histories: list[list[int]]) -> None:
    for earlier, later in pairwise(sorted(histories, key=len)):
        assert later[: len(earlier)] == earlier, f"two histories: {earlier} and {later}"


def _claimed_at(run: Interleaving) -> dict[int, int]:
    """The moment of each attempt's claim."""
    moments: dict[int, int] = {}
    for moment, step in enumerate(run.steps):
        number = LAYOUT.attempt_number(step.pending.path)
        if number is not None and step.pending.operation == "create" and step.took_effect:
            moments[number] = moment
    return moments


def _done_at(run: Interleaving, folder: str, operation: str) -> dict[CheckpointId, int]:
    """The moment at which each checkpoint's object in `folder` was made."""
    return {
        checkpoint: moment
        for moment, step in enumerate(run.steps)
        if step.pending.operation == operation
        and step.pending.path.startswith(folder)
        and step.took_effect
        and (checkpoint := LAYOUT.checkpoint_id(step.pending.path)) is not None
    }


def _committed_in_time(run: Interleaving) -> set[CheckpointId]:
    """What was committed before any later attempt had claimed."""
    claims = _claimed_at(run)
    never = len(run.steps)
    return {
        checkpoint
        for checkpoint, moment in _done_at(run, LAYOUT.commits, "create").items()
        if moment < claims.get(checkpoint.attempt + 1, never)
    }


def _assert_no_silent_restart(store: Store, run: Interleaving) -> None:
    in_time = _committed_in_time(run)
    for view in read_attempts(store, LAYOUT):
        if view.resumed is not None and view.resumed.checkpoint is None:
            lost = [str(c) for c in in_time if c.attempt < view.number]
            assert not lost, f"attempt {view.number} starts at step 0 after {lost}"


def _assert_stale_attempts_leave_all_as_it_is(run: Interleaving) -> None:
    """Registered is what was committed in time, or what the next attempt goes on from."""
    in_time = _committed_in_time(run)
    for step in run.steps:
        path = step.pending.path
        if path.startswith(REGISTRY) and step.took_effect:
            checkpoint = LAYOUT.checkpoint_id(path)
            own = (
                checkpoint is not None
                and _attempt_of(run, step.pending.actor) == checkpoint.attempt
            )
            assert not own or checkpoint in in_time, f"{path}: registered by a stale attempt"


def _attempt_of(run: Interleaving, actor: int) -> int | None:
    """The attempt that an actor claimed."""
    for step in run.steps:
        number = LAYOUT.attempt_number(step.pending.path)
        made = step.pending.operation == "create" and step.took_effect
        if made and number and step.pending.actor == actor:
            return number
    return None
