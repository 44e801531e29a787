"""The writer: digests, writes and commits what lies in the arena, in a process of its own.

``python -m ckpt_tasks.checkpointer.writer_process SOCKET_FD ARENA_FD TRAINER_PID``. It imports
neither torch nor numpy, lives in a session of its own, and takes one job at a time from its socket.
A trainer that dies after it has handed a save over costs that save nothing: it is written and
committed, under the fence, and then the writer ends. One that dies before leaves nothing to do.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from ckpt_tasks import errors
from ckpt_tasks.checkpointer.arena import map_arena
from ckpt_tasks.checkpointer.failures import failure_of
from ckpt_tasks.checkpointer.job import JobRunner, SaveJob, committed_event
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError, StoreError
from ckpt_tasks.events import EventLog, EventSink, discard_event
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, IndexRef
from ckpt_tasks.masking import mask_text
from ckpt_tasks.store.open import open_store

__all__ = ["MAX_MESSAGE_BYTES", "JobResult", "Notice", "WriterSpec", "main"]

MAX_MESSAGE_BYTES = 512 * 1024
"""A result holds a commit record, of 64 KB at most, and a message."""

_POLL_MILLISECONDS = 500
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class WriterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a writer is told once.

    Parameters
    ----------
    run, attempt
        What it writes for.
    store
        As configured, so that it opens the same.
    conditional_create
        Whether the store honours conditions, as the trainer found out when it opened it.
    incremental, base
        For its `JobRunner`.
    events
        Path of the log in which it tells of commits.
    failures
        Folder in which it finds what ranks cannot write, where there are several (see
        `checkpointer.failures`).
    """

    run: str
    attempt: int
    store: StoreConfig
    conditional_create: bool
    incremental: bool
    base: IndexRef | None = None
    events: str
    failures: str | None = None


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """A save lies in the arena: the image in the first `size` bytes, the encoded `SaveJob` from
    `start` to `stop`. Large things never go through the socket, which could be full.
    """

    size: int
    start: int
    stop: int


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a save ended: a commit record, or the name of an error's class and its message."""

    record: CommitRecord | None = None
    error: str = ""
    message: str = ""

    def unwrap(self) -> CommitRecord:
        """The record; raises the error where there is none."""
        if self.record is not None:
            return self.record
        kind = getattr(errors, self.error) if self.error in errors.__all__ else StoreError
        raise kind(self.message)


class Writer:
    """One writer's life.

    Parameters
    ----------
    channel
        Its only other end is the trainer's.
    arena
        Descriptor of the arena's file.
    trainer
        Process id of the trainer, this process's parent.
    """

    def __init__(self, channel: socket.socket, arena: int, trainer: int) -> None:
        self._channel = channel
        self._arena = arena
        self._trainer = trainer
        self._memory: mmap.mmap | None = None
        self._spec = self._receive_spec()
        self._events = _open_log(self._spec.events)
        self._runner: JobRunner | None = None

    def run(self) -> None:
        """Do what is handed over, until the trainer is gone or has nothing more."""
        while (message := self._next_message()) is not None:
            result = self._handle(msgspec.msgpack.decode(message, type=Notice))
            try:
                self._channel.send(msgspec.msgpack.encode(result))
            except OSError:  # the trainer is gone, and the commit has been told in the log
                return

    def _receive_spec(self) -> WriterSpec:
        message = self._next_message()
        if message is None:
            sys.exit(0)  # the trainer died before it had anything to write
        return msgspec.msgpack.decode(message, type=WriterSpec)

    def _next_message(self) -> bytes | None:
        """``None`` once nothing more can come.

        A process that the user's code has forked may hold the trainer's end of the socket, too:
        so the trainer's death is also looked for.
        """
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            orphaned = os.getppid() != self._trainer
            if poll.poll(0 if orphaned else _POLL_MILLISECONDS):
                try:
                    return self._channel.recv(MAX_MESSAGE_BYTES) or None
                except ConnectionError:
                    return None
            if orphaned:
                return None

    def _handle(self, notice: Notice) -> JobResult:
        try:
            record, job = self._write(notice)
        except CkptTasksError as error:
            return JobResult(error=type(error).__name__, message=str(error))
        except Exception as error:
            # A bug here, or of a client library: a save that failed, told, and no training's end.
            traceback.print_exception(error)
            said = mask_text(f"{type(error).__name__}: {error}")
            return JobResult(error="StoreError", message=f"unexpected in the writer: {said}")
        if job.commits:
            self._events(committed_event(record, job.seconds))
        return JobResult(record=record)

    def _write(self, notice: Notice) -> tuple[CommitRecord, SaveJob]:
        memory = self._mapped(notice.stop)
        job = msgspec.msgpack.decode(memory[notice.start : notice.stop], type=SaveJob)
        return self._opened_runner().run(job, memory[: notice.size]), job

    def _mapped(self, size: int) -> memoryview:
        """The arena, as far as `size`: it may have grown."""
        if self._memory is None or len(self._memory) < size:
            self._memory = map_arena(self._arena, size)
        return memoryview(self._memory)

    def _opened_runner(self) -> JobRunner:
        if self._runner is None:
            spec, layout = self._spec, RunLayout(self._spec.run)
            try:
                store = open_store(spec.store)
            except ConfigError as error:
                # The trainer has opened it just so: credentials, say, may be renewed.
                raise StoreError(str(error)) from error
            store.supports_conditional_create = spec.conditional_create
            self._runner = JobRunner(
                store,
                layout,
                Fence(store, layout, spec.attempt),
                incremental=spec.incremental,
                base=spec.base,
                failure=_failures_in(spec.failures),
            )
        return self._runner


def _failures_in(folder: str | None) -> Callable[[str], str | None]:
    return partial(failure_of, Path(folder)) if folder else lambda checkpoint: None


def _open_log(path: str) -> EventSink:
    try:
        return EventLog(path)
    except FileNotFoundError:  # of an attempt that is over: nobody is left to read it
        return discard_event


def main() -> int:
    # Whoever ends the training's processes must leave this one to finish.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    Writer(channel, int(sys.argv[2]), int(sys.argv[3])).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
