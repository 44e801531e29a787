"""What is told of training between its saves: metrics with their steps, how far it is, warnings."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt_tasks.events import EventSink, MetricsLogged, Progress, Warned
from ckpt_tasks.training.metrics import JOURNAL_ROWS, MetricBuffer
from ckpt_tasks.types import Position

__all__ = ["Reporter"]

_SEND_SECONDS = 0.1  # between two messages about metrics and progress


class Reporter:
    """Sends it in batches, so that a step of microseconds is not spent on messages."""

    def __init__(self, on_event: EventSink, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_event = on_event
        self._clock = clock
        self._warned: set[str] = set()
        self._sent_at = clock()
        self.metrics = MetricBuffer()
        self.epochs_total: int | None = None

    def restart_clock(self) -> None:
        """Training begins now: the first batch is due a little later."""
        self._sent_at = self._clock()

    def close_step(self, step: int) -> None:
        """What was logged since the last boundary belongs to `step`."""
        dropped = self.metrics.close_step(step)
        if dropped:
            self.warn_once(
                f"metrics {dropped} were logged twice for one step; the first value was kept"
            )

    def flush_if_due(self, position: Position) -> None:
        """`flush`, if the last one is long enough ago."""
        if self._clock() - self._sent_at >= _SEND_SECONDS:
            self.flush(position)

    def flush(self, position: Position) -> None:
        """Send what has been logged up to the last boundary, and how far training is."""
        rows = self.metrics.drain()
        if rows:
            self._on_event(MetricsLogged(rows=rows))
        if self.metrics.has_overflowed:
            self.warn_once(
                f"more than {JOURNAL_ROWS} metric values were logged between two checkpoints, "
                "which keep the newest of them only: those before are lost, unless the registry "
                "takes them while this attempt runs; save more often, or log less often"
            )
        self._on_event(Progress(position=position, epochs=self.epochs_total))
        self._sent_at = self._clock()

    def warn_once(self, message: str) -> None:
        """Send a warning, the first time that it is given."""
        if message not in self._warned:
            self._warned.add(message)
            self._on_event(Warned(message=message))
