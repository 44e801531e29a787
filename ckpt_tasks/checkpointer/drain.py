"""Where a staged save goes: written and committed by another process, or in this one."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ckpt_tasks.checkpointer.arena import Arena
from ckpt_tasks.checkpointer.job import JobRunner, SaveJob
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.format.records import CommitRecord

__all__ = ["Drain", "InlineDrain", "WriterDiedError"]


class WriterDiedError(Exception):
    """The process that wrote is gone; what it had begun is no checkpoint unless it is listed."""


class Drain(ABC):
    """Takes one save at a time from the arena to a commit.

    Attributes
    ----------
    is_concurrent
        Training goes on meanwhile, and it tells of each commit itself, so that one is told even
        where nobody asks any more.
    """

    is_concurrent: bool

    @abstractmethod
    def prepare(self, arena: Arena) -> None:
        """Get ready, without waiting for it."""

    @abstractmethod
    def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
        """Begin to write the image that fills `size` bytes of the arena, which is not touched
        until `poll` has told how it went.

        Raises `StoreError` where it cannot begin.
        """

    @abstractmethod
    def poll(self, timeout: float) -> CommitRecord | None:
        """The commit record, or ``None`` where the save still goes on after `timeout` seconds.

        Raises
        ------
        WriterDiedError
            It did not end; it can be handed over again, under another name.
        CkptTasksError
            It failed; see `JobRunner`.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing to stop
        """Give the save up that is under way; afterwards the arena may be used again."""

    def close(self) -> None:  # noqa: B027
        """Nothing more will be handed over; what was goes on."""


class InlineDrain(Drain):
    """Writes in this process, while training waits."""

    is_concurrent = False

    def __init__(self, runner: JobRunner) -> None:
        self._runner = runner
        self._ended: CommitRecord | CkptTasksError | None = None

    def prepare(self, arena: Arena) -> None:
        pass

    def hand_over(self, job: SaveJob, arena: Arena, size: int) -> None:
        memory = arena.reserve(size)
        try:
            self._ended = self._runner.run(job, memory)
        except CkptTasksError as error:
            self._ended = error

    def poll(self, timeout: float) -> CommitRecord | None:
        ended, self._ended = self._ended, None
        if isinstance(ended, CkptTasksError):
            raise ended
        return ended
