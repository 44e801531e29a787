"""After a resume some of the user's code runs again: what it draws and logs is undone."""

from __future__ import annotations

from typing import Any

from ckpt_tasks.state.rng import restore_rng
from ckpt_tasks.training.reporter import Reporter

__all__ = ["Rewind"]


class Rewind:
    """Sets the random generators to what they were, and forgets what was logged since.

    Nobody can tell where the last code that runs again ends, so it is done at each place that
    may be the last before training goes on. Without a resume it does nothing.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._rng: dict[str, Any] | None = None

    def begin(self, rng: dict[str, Any]) -> None:
        """A checkpoint has been restored, with the generators' states `rng`."""
        self._rng = rng
        self.here(last=False)

    def here(self, *, last: bool) -> None:
        """Undo it; with `last`, for the last time."""
        if self._rng is None:
            return
        for warning in restore_rng(self._rng):
            self._reporter.warn_once(warning)
        self._reporter.metrics.discard_open()
        if last:
            self.end()

    def end(self) -> None:
        """Training has gone on: what is drawn and logged from now on stays."""
        self._rng = None
