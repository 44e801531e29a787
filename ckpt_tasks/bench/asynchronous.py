"""Asynchronous saves by this package, and rounds of all who make them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckpt_tasks.bench.ours import begin_run, checkpointer_of, new_run, remove_run, request
from ckpt_tasks.bench.processes import cpu_seconds
from ckpt_tasks.bench.states import advance
from ckpt_tasks.bench.training import (
    AsyncSave,
    Disturbance,
    NotMeasuredError,
    Training,
    save_while_training,
)
from ckpt_tasks.checkpointer.writer_client import ProcessDrain
from ckpt_tasks.checkpointer.writer_process import WriterSpec
from ckpt_tasks.config import SaveConfig, StoreConfig
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.overlap import StepFence
from ckpt_tasks.store.base import Store

__all__ = ["AsyncRounds", "OursAsync", "alternate_async"]

_WAIT_SECONDS = 1.0
_END_SECONDS = 10.0  # for a save in flight, before its writer is killed


class OursAsync(AsyncSave):
    """Staged in an arena, and handed over to a writer's process.

    Parameters
    ----------
    config
        Opens `store` in the writer.
    save
        As users configure it.
    scratch
        A folder for the writer's log.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        config: StoreConfig,
        items: Mapping[str, Any],
        *,
        save: SaveConfig,
        scratch: Path,
    ) -> None:
        self.name = name
        self._store = store
        self._items = items
        self._layout = new_run()
        self._writer: int | None = None
        spec = WriterSpec(
            run=self._layout.run,
            attempt=1,
            store=config,
            conditional_create=store.supports_conditional_create,
            incremental=save.incremental,
            events=str(scratch / f"{self._layout.root}.events"),
        )
        self._fence = StepFence() if save.overlap else None
        if self._fence is not None:
            self._fence.watch(items)
        self._checkpointer = checkpointer_of(ProcessDrain(spec, self._started), self._layout)
        self._checkpointer.prepare(capture(items))

    @property
    def writer(self) -> int | None:
        """Process id of the writer, once there is one."""
        return self._writer

    def beside(self, training: Training) -> None:
        if self._fence is not None:
            # As if it trained the state: its steps wait for what is still being copied.
            self._fence.watch({"optimizer": training.optimizer})

    def prepare(self, number: int) -> None:
        begin_run(self._store, self._layout)
        advance(image.data for image in capture(self._items).tensors)

    def begin(self, number: int) -> None:
        began = time.perf_counter()
        captured = capture(self._items)
        state = captured if self._fence is None else self._fence.overlap(captured, captured)
        taken = time.perf_counter() - began
        self._checkpointer.begin(
            state, msgspec.structs.replace(request(number), capture_seconds=taken)
        )

    def is_done(self) -> bool:
        return self._checkpointer.poll() is not None

    def save(self, number: int) -> CommitRecord:
        """One that is waited for."""
        self.prepare(number)
        self.begin(number)
        while (record := self._checkpointer.poll(_WAIT_SECONDS)) is None:
            pass
        return record

    def helper_cpu_seconds(self) -> float:
        return cpu_seconds([self._writer] if self._writer is not None else [])

    def stop(self) -> None:
        if self._checkpointer.in_flight is not None:
            with contextlib.suppress(CkptTasksError):  # what ended it is told already
                self._checkpointer.poll(_END_SECONDS)
        self._checkpointer.give_up()
        self._checkpointer.close()
        remove_run(self._store, self._layout)

    def _started(self, pid: int) -> None:
        self._writer = pid


class AsyncRounds(msgspec.Struct, frozen=True, kw_only=True):
    """Rounds of several asynchronous saves.

    Parameters
    ----------
    copies
        Seconds of the bare copy in each round.
    saves
        Name to what it did in each round.
    missing
        A word on each that could not be measured to the end.
    """

    copies: list[float]
    saves: dict[str, list[Disturbance]]
    missing: list[str]


def alternate_async(
    training: Training,
    saves: Sequence[AsyncSave],
    copy: Callable[[], object],
    rounds: int,
    *,
    limit: float,
) -> AsyncRounds:
    """Measure all of them `rounds` times, in turn, beside the same training.

    A round before them is not counted. One that fails, or takes longer than `limit` seconds, is
    stopped and left out from then on.
    """
    left = list(saves)
    for save in saves:
        save.beside(training)
    result = AsyncRounds(copies=[], saves={}, missing=[])
    for number in range(rounds + 1):
        began = time.perf_counter()
        copy()
        taken = time.perf_counter() - began
        measured = {}
        for save in tuple(left):
            try:
                measured[save.name] = save_while_training(training, save, number, limit=limit)
            except (NotMeasuredError, CkptTasksError) as error:
                left.remove(save)
                result.saves.pop(save.name, None)
                result.missing.append(f"{save.name}: {error}")
                save.stop()
        if number:
            result.copies.append(taken)
            for name, disturbance in measured.items():
                result.saves.setdefault(name, []).append(disturbance)
    return result
