"""The writer as the trainer sees it: a child that takes what was staged to a commit."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.drain import Drain, WriterDiedError
from ckpt_tasks.checkpointer.job import SaveJob
from ckpt_tasks.checkpointer.writer_process import (
    MAX_MESSAGE_BYTES,
    JobResult,
    Notice,
    WriterSpec,
)
from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.records import CommitRecord

__all__ = ["ProcessDrain"]

_PAGE = 4096
_DEATH_SECONDS = 5.0
"""A writer that stands in the kernel, before a file system that does not answer, dies when that
does. It will not come back to its code, so what it was given may be used again meanwhile."""


class ProcessDrain(Drain):
    """Has a writer's process do it, which is started when it is needed, and again if it dies.

    Parameters
    ----------
    spec
        What the writer is told.
    on_start
        Given the process id of each writer that is started, before it is told anything.
    """

    is_concurrent = True

    def __init__(self, spec: WriterSpec, on_start: Callable[[int], None]) -> None:
        self._spec = spec
        self._on_start = on_start
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def prepare(self, arena: Arena) -> None:
        with contextlib.suppress(StoreError):  # the save that wants it tells
            self._started(arena)

    def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
        encoded = msgspec.msgpack.encode(job)
        start = -(-size // _PAGE) * _PAGE
        stop = start + len(encoded)
        arena.reserve(stop)[start:stop] = encoded
        notice = msgspec.msgpack.encode(Notice(size=size, start=start, stop=stop))
        try:
            self._started(arena).send(notice, socket.MSG_DONTWAIT)
        except OSError:
            # It has died while it had nothing to do: another one takes over at once.
            self.stop()
            channel = self._started(arena)
            try:
                channel.send(notice, socket.MSG_DONTWAIT)
            except OSError as error:
                self.stop()
                raise StoreError(
                    f"the process that writes checkpoints takes nothing: {error}"
                ) from error

    def poll(self, timeout: float) -> CommitRecord | None:
        assert self._channel is not None, "nothing was handed over"
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return None
        try:
            message = self._channel.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            message = b""
        if not message:
            raise WriterDiedError(self._how_it_died())
        record = msgspec.msgpack.decode(message, type=JobResult).unwrap()
        # Should this writer die, the next one refers to what this one has written.
        self._spec = msgspec.structs.replace(self._spec, base=record.indexes[0])
        return record

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._forget()

    def close(self) -> None:
        """The writer ends by itself, once what was handed over is written."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _started(self, arena: Arena) -> socket.socket:
        """The channel to a writer."""
        if self._channel is not None:
            return self._channel
        try:
            return self._start(arena)
        except StoreError:  # there is no memory for the arena
            raise
        except OSError as error:
            self.stop()
            raise StoreError(
                f"the process that writes checkpoints cannot be started: {error}"
            ) from error

    def _start(self, arena: Arena) -> socket.socket:
        descriptor = arena.descriptor
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [
                *(sys.executable, "-m", "ckpt_tasks.checkpointer.writer_process"),
                *(str(theirs.fileno()), str(descriptor), str(os.getpid())),
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), descriptor],
                start_new_session=True,
            )
        self._on_start(self._process.pid)
        self._channel.send(msgspec.msgpack.encode(self._spec))
        return self._channel

    def _how_it_died(self) -> str:
        assert self._process is not None
        returned = self._process.wait()
        self._forget()
        if returned < 0:
            return f"was killed by signal {-returned}"
        return f"ended with {returned}"

    def _forget(self) -> None:
        self.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_DEATH_SECONDS)
            self._process = None
