"""Heartbeats: how one host tells another that an attempt is alive, without trusting clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckpt_tasks.errors import (
    CorruptCheckpointError,
    ObjectNotFoundError,
    StoreError,
    UnsupportedFormatError,
)
from ckpt_tasks.fencing.process import this_uptime
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Failure, Heartbeat, now
from ckpt_tasks.replay import Replay
from ckpt_tasks.store.base import Store

__all__ = ["Heart", "HeartbeatObserver", "read_heartbeat"]

_MAX_HEARTBEAT_BYTES = 64 * 1024


class Heart:
    """Overwrites an attempt's heartbeat from a thread until it is stopped.

    Parameters
    ----------
    interval
        Seconds between two beats.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        attempt: int,
        *,
        interval: float,
    ) -> None:
        self._store = store
        self._path = layout.heartbeat(attempt)
        self._attempt = attempt
        self._interval = interval
        self._beat = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.step: int | None = None
        """How far training is known to have come."""
        self.failure: Failure | None = None
        """What it ended with, once that is known."""
        self.replay: Replay | None = None
        """What the steps that it did again have shown, once that is known."""
        self.last_error: StoreError | None = None
        """Why the latest beat failed; a missed beat costs nothing until others take over."""
        self.missed = 0
        """How many beats up to the latest failed in a row."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, ended: bool) -> None:
        """Stop; with `ended`, say in the store that the attempt is over."""
        self._stopped.set()
        self._thread.join()
        if ended:
            self._write(ended=True)

    def _run(self) -> None:
        self._write(ended=False)
        while not self._stopped.wait(self._interval):
            self._write(ended=False)

    def _write(self, *, ended: bool) -> None:
        self._beat += 1
        beat = Heartbeat(
            attempt=self._attempt,
            beat=self._beat,
            at=now(),
            uptime=this_uptime(),
            step=self.step,
            ended=ended,
            failure=self.failure,
            replay=self.replay,
        )
        try:
            self._store.put(self._path, encode(beat))
            self.last_error, self.missed = None, 0
        except StoreError as error:
            self.last_error, self.missed = error, self.missed + 1


class HeartbeatObserver:
    """Watches another attempt's heartbeat by this process's own clock."""

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        attempt: int,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._path = layout.heartbeat(attempt)
        self._sleep = sleep
        self._clock = clock

    def is_silent(self, seconds: float, *, poll: float = 0.5) -> bool:
        """Wait until the heartbeat changes (False), or says that the attempt has ended or has
        not changed for `seconds` (True).
        """
        first = self._read()
        deadline = self._clock() + seconds
        while True:
            if first is not None and first.ended:
                return True
            if self._clock() >= deadline:
                return True
            self._sleep(min(poll, seconds))
            current = self._read()
            if current is not None and current.ended:
                return True
            if current != first:
                return False

    def _read(self) -> Heartbeat | None:
        return _read(self._store, self._path)


def read_heartbeat(store: Store, layout: RunLayout, attempt: int) -> Heartbeat | None:
    """An attempt's latest heartbeat; ``None`` where there is none, or no readable one."""
    return _read(store, layout.heartbeat(attempt))


def _read(store: Store, path: str) -> Heartbeat | None:
    try:
        return decode(store.read(path, limit=_MAX_HEARTBEAT_BYTES), Heartbeat, path=path)
    except (ObjectNotFoundError, CorruptCheckpointError, UnsupportedFormatError):
        # One that cannot be read is no sign of life; it protects nothing by itself.
        return None
