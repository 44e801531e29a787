"""How long to go on asking a storage or registry that fails for one run after the other.

Each call to a server that is gone may wait for a time-out, and a store may have thousands of runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Patience"]

_SECONDS = 60.0
_FAILURES = 3
"""One run that takes long to fail is that run's own trouble."""


class Patience:
    """Counts failures that follow one another, and the time that they took.

    Parameters
    ----------
    clock
        Seconds, from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = 0.0
        self._failures = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Something is tried."""
        self._began = self._clock()

    def end(self, *, failed: bool) -> None:
        """It was tried; a success makes up for all that has failed before."""
        self._failures = self._failures + 1 if failed else 0
        self._seconds = self._seconds + self._clock() - self._began if failed else 0.0

    @property
    def is_over(self) -> bool:
        return self._failures >= _FAILURES and self._seconds > _SECONDS

    def __str__(self) -> str:
        return (
            f"not looked at: for the {self._failures} runs before, this failed, and took "
            f"{self._seconds:.0f} s"
        )
