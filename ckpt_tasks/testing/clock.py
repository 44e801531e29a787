"""A clock that tests move by hand."""

from __future__ import annotations

import threading

__all__ = ["FakeClock"]


class FakeClock:
    """Stands in for `time.monotonic` (call it) and `time.sleep` (its `sleep`).

    Parameters
    ----------
    start
        Seconds it shows at first.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._lock = threading.Lock()
        self.slept: list[float] = []
        """Seconds of each `sleep`, in order."""

    def __call__(self) -> float:
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        with self._lock:
            self._now += seconds

    def sleep(self, seconds: float) -> None:
        """Return at once; the clock shows `seconds` more."""
        self.slept.append(seconds)
        self.advance(seconds)
