"""Metrics of a run: one value per key and step, sent in batches, kept with each checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.types import Number, finite_or_text

__all__ = ["JOURNAL_ROWS", "MetricBuffer"]

Row = tuple[str, Number, int, int]

JOURNAL_ROWS = 100_000
"""Rows that a checkpoint keeps: some 6 MB of its index, which is held in memory, here and by every
reader, and may not be larger than `MAX_INDEX_BYTES`."""

_RECORDED_KEYS = 500  # a commit record is small


class MetricBuffer:
    """Collects what `TrainingRun.log` is given until a boundary gives it its step."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Any, int]] = {}
        self._unsent: list[tuple[str, Any, int, int]] = []
        self._journal: deque[Row] = deque(maxlen=JOURNAL_ROWS)
        self._given = self._pushed_out = 0  # rows of the latest `journal`, and those it lost since
        self._step = 0
        self._logged: set[str] = set()
        self.has_overflowed = False
        """More rows came between two checkpoints than the later one keeps."""
        self.of_step: dict[str, Number] = {}
        """What was logged for the last step that was closed, as far as drained: a commit record's
        metrics. Never older values, which were measured on other weights."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep `values` for the step under way; a key given twice keeps its last value."""
        now = time.time_ns() // 1_000_000
        for key, value in values.items():
            self._open[key] = (_number(key, value), now)

    def close_step(self, step: int) -> list[str]:
        """Give what was logged since the last boundary the number `step`.

        Returns the keys that were dropped, as they had a value for this step already.
        """
        if step != self._step:
            self._step = step
            self._logged.clear()
            self.of_step.clear()
        dropped = []
        for key, (value, time_ms) in self._open.items():
            if key in self._logged:
                dropped.append(key)
            else:
                self._logged.add(key)
                self._unsent.append((key, value, step, time_ms))
        self._open.clear()
        return dropped

    def discard_open(self) -> None:
        """Forget what was logged since the last boundary."""
        self._open.clear()

    @property
    def logged(self) -> list[str]:
        """The keys that have a value for the last step that was closed."""
        return sorted(self._logged)

    def drain(self) -> list[Row]:
        """Rows not yet sent. Values on an accelerator are read here, not at every step."""
        rows: list[Row] = [
            (key, finite_or_text(float(value)), step, time_ms)
            for key, value, step, time_ms in self._unsent
        ]
        self._unsent.clear()
        too_many = len(self._journal) + len(rows) - JOURNAL_ROWS
        self.has_overflowed |= too_many > 0
        self._pushed_out = min(self._pushed_out + max(0, too_many), self._given)
        self._journal.extend(rows)
        for key, value, step, _ in rows:
            if step == self._step and len(self.of_step) < _RECORDED_KEYS:
                self.of_step[key] = value
        return rows

    def journal(self) -> list[Row]:
        """Rows sent since the last checkpoint: the newest, should they be too many."""
        self._given, self._pushed_out = len(self._journal), 0
        return list(self._journal)

    def forget_journal(self) -> None:
        """A checkpoint holds what `journal` gave last; later rows have come since."""
        for _ in range(self._given - self._pushed_out):
            self._journal.popleft()
        self._given = self._pushed_out = 0

    def restore(self, of_step: Mapping[str, Number], step: int, logged: Iterable[str]) -> None:
        """Start from what a checkpoint knew.

        Parameters
        ----------
        of_step
            The metrics that it recorded.
        step, logged
            Its step, and the keys that had a value for it.
        """
        self.of_step = dict(of_step)
        self._step = step
        self._logged = set(logged)


def _number(key: str, value: Any) -> Any:
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise StateError(f"metric {key!r} is a tensor of {value.numel()} elements, not one")
        if value.is_complex():
            raise StateError(f"metric {key!r} is a complex tensor; log its parts")
        # Reading a value from an accelerator waits for it; a copy does not, and is needed, as
        # the user may go on adding to this tensor.
        value = value.detach()
        return float(value) if value.device.type == "cpu" else value.clone()
    try:
        return float(value)
    except OverflowError as error:
        raise StateError(f"metric {key!r} is too large for a float") from error
    except (TypeError, ValueError) as error:
        raise StateError(f"metric {key!r} is no number but {type(value).__name__}") from error
