"""Handing a save over to the process that writes it, and starting that."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest
from support.made_runs import MadeRun, State, save_request
from support.scarce import no_more_files

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.checkpointer.drain import Drain
from ckpt_tasks.checkpointer.job import SaveJob
from ckpt_tasks.checkpointer.writer_client import ProcessDrain
from ckpt_tasks.checkpointer.writer_process import WriterSpec
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.records import CommitRecord


@contextmanager
def nothing() -> Iterator[None]:
    yield


def disk_is_full(pid: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("trouble", "on_start"),
    [
        pytest.param(no_more_files, lambda pid: None, id="no descriptors"),
        pytest.param(nothing, disk_is_full, id="no space for its name"),
    ],
)
def test_a_writer_that_cannot_be_started_fails_the_save_and_no_training(
    tmp_path: Path,
    trouble: Callable[[], AbstractContextManager[None]],
    on_start: Callable[[int], None],
) -> None:
    """Whatever the system lacks; what was begun of it is not left behind."""
    spec = WriterSpec(
        run="digits",
        attempt=1,
        store=StoreConfig(url=str(tmp_path)),
        conditional_create=True,
        incremental=True,
        events=str(tmp_path / "events"),
    )
    run = MadeRun()
    record = run.record(run.begin().save(1))
    job = SaveJob(
        image=msgspec.Raw(msgspec.msgpack.encode(None)),
        trees=msgspec.Raw(msgspec.msgpack.encode({})),
        rows=[],
        draft=record,
        seconds=0.0,
    )
    arena = Arena()
    arena.reserve(1)
    drain = ProcessDrain(spec, on_start)
    before = len(os.listdir("/proc/self/fd"))
    with trouble():
        drain.prepare(arena)
        with pytest.raises(StoreError, match="cannot be started"):
            drain.hand_over(job, arena, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    drain.close()
    arena.close()


def test_what_is_given_up_before_it_was_handed_over_never_is() -> None:
    """Nothing writes it from memory that the next save fills, or fills that with it."""
    run = MadeRun()
    order: list[str] = []
    released = threading.Event()

    class Watched(Drain):
        is_concurrent = True

        def prepare(self, arena: Arena) -> None:
            pass

        def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
            order.append("handed over")

        def poll(self, timeout: float) -> CommitRecord | None:
            return None

        def stop(self) -> None:
            order.append("stopped")

    class Slow(State):
        def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
            released.wait()
            return 0.0

    attempt = run.begin()
    checkpointer = Checkpointer(
        Watched(),
        run.identity,
        attempt.number,
        attempt.recovered.lineage,
        hyperparameters={},
        environment={},
    )
    checkpointer.begin(Slow(), save_request(1))
    assert checkpointer.poll() is None
    threading.Timer(0.2, released.set).start()
    checkpointer.give_up()
    checkpointer.close()
    assert order == ["handed over", "stopped"]
