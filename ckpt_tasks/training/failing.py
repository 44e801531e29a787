"""Saves that fail, one after the other: told shortly, and when the next one is tried."""

from __future__ import annotations

import msgspec

from ckpt_tasks.errors import CkptTasksError, NoSpaceError
from ckpt_tasks.events import SaveFailed
from ckpt_tasks.types import SaveDecision

__all__ = ["Failing"]

_TOLD_EVERY = 10  # failures of one kind
_COLLECTION_SECONDS = 5.0  # in which bytes that have expired may have been removed


class Failing(msgspec.Struct, frozen=True, kw_only=True):
    """Saves fail, and none has succeeded since the first that did.

    Parameters
    ----------
    decision
        Why the latest was made.
    since, retry_at
        When the first of them began, and when to try again, by the clock.
    count
        How many have failed.
    kind
        Of the latest failure.
    again
        People have been told of failures of this kind.
    """

    decision: SaveDecision
    since: float
    retry_at: float
    count: int
    kind: type[CkptTasksError]
    again: bool = False

    @classmethod
    def following(
        cls,
        before: Failing | None,
        error: CkptTasksError,
        decision: SaveDecision,
        *,
        begun: float,
        now: float,
        pause: float,
        makes_room: bool,
    ) -> Failing:
        """One failure more.

        Parameters
        ----------
        begun, now, pause
            When the save began; the time; seconds between two tries.
        makes_room
            What has expired is being removed where there was no room: the second try comes soon.
        """
        count = 1 if before is None else before.count + 1
        if count == 1 and makes_room and isinstance(error, NoSpaceError):
            pause = min(pause, _COLLECTION_SECONDS)
        told = before is not None and before.kind is type(error)
        return cls(
            decision=decision,
            since=begun if before is None else before.since,
            retry_at=now + pause,
            count=count,
            kind=type(error),
            again=told and count % _TOLD_EVERY != 0,
        )

    def told(
        self, run: str, checkpoint: str, error: CkptTasksError, unprotected: float
    ) -> SaveFailed:
        """The latest failure as an event; `unprotected` in seconds."""
        return SaveFailed(
            run=run,
            checkpoint=checkpoint,
            why=str(error),
            unprotected=unprotected,
            failures=self.count,
            again=self.again,
            no_space=issubclass(self.kind, NoSpaceError),
        )

    @property
    def may_find_room(self) -> bool:
        """Whether the next try is the first after bytes may have been removed."""
        return self.count == 1 and issubclass(self.kind, NoSpaceError)
