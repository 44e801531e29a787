"""How long an operation of storage may take, and what is done with one that takes longer.

A time-out of each wait for the other side does not end an answer of a byte every few seconds, such
as a proxy or an overloaded server gives. So each operation has a deadline: some seconds, and more
for the bytes that it moves, at the least rate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["LeastRate", "NoAnswerError", "TooSlowError", "seconds_for", "within"]

BASE_SECONDS = 90.0
"""For what moves no bytes: connections, names, the server's own work. A healthy store takes
milliseconds. gcsfs spends a minute on asking what kind a bucket is, once, where a firewall lets no
gRPC through."""

GRACE_SECONDS = 30.0
"""Before the rate of a transfer under way is looked at: one stall of a network, such as a change
of its route, takes less."""

LEAST_RATE = 128 * 1024
"""Bytes per second of all connections together: a link of one megabit. Ten megabytes take more
than a minute over it, so it saves no model's checkpoints in time; every slower one is broken."""

T = TypeVar("T")


class NoAnswerError(Exception):
    """An operation was given up; it may still take effect.

    Neither this nor the next is an `OSError`: fsspec and botocore replace those by errors of their
    own, which do not say what happened.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"no answer within {seconds:.0f} seconds; see whether the network and the store are "
            "up, then run it again"
        )


class TooSlowError(Exception):
    """A transfer was below the least rate, and was cut."""


def seconds_for(size: int, connections: int) -> float:
    """How long an operation may take that moves `size` bytes, over one of so many connections."""
    return BASE_SECONDS + size * connections / LEAST_RATE


class LeastRate:
    """Watches a transfer that reports its progress; begins when it is made.

    Parameters
    ----------
    connections
        Of which this transfer has one.
    """

    def __init__(self, connections: int) -> None:
        self._rate = LEAST_RATE / connections
        self._begun = time.monotonic()

    def check(self, done: int) -> None:
        """Raise `TooSlowError` where `done` bytes are too few for the time since the beginning."""
        seconds = time.monotonic() - self._begun
        if seconds > GRACE_SECONDS + done / self._rate:
            raise TooSlowError(
                f"{done} bytes came through in {seconds:.0f} seconds, fewer than {self._rate:.0f} "
                "a second: see why the network or the store is so slow, then run it again"
            )


def within(
    seconds: float, act: Callable[[], T], *, progressed: Callable[[], float] | None = None
) -> T:
    """What `act` returns or raises, if it ends in time.

    It runs in a thread of its own, because nothing else ends a call that blocks in somebody else's
    code. Where it does not end it is given up: **it goes on**, may still succeed, and what it
    returns is dropped. So it must hold no memory that is used again. Its thread does not keep the
    interpreter from exiting.

    Parameters
    ----------
    progressed
        Since when, by `time.monotonic`, `act` has got no further. The seconds are counted from
        there; without it, from the beginning.

    Raises
    ------
    NoAnswerError
        It had not ended in time.
    """
    future: Future[T] = Future()
    begun = time.monotonic()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # raised again by who waits
            future.set_exception(error)

    threading.Thread(target=run, name="ckpt-tasks-store", daemon=True).start()
    left = seconds
    while left > 0:
        if wait([future], left).done:
            return future.result()
        since = begun if progressed is None else progressed()
        left = since + seconds - time.monotonic()
    raise NoAnswerError(seconds)
