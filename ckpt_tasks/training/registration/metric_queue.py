"""Metrics on their way to a registry: each key and step once, replayed ones compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from ckpt_tasks.errors import RegistryRefusedError
from ckpt_tasks.events import EventSink, Warned
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.replay import Replay
from ckpt_tasks.training.registration.audit import FirstValues, ReplayAudit
from ckpt_tasks.types import MetricRow

__all__ = ["BATCH_ROWS", "MetricQueue"]

BATCH_ROWS = 1000


class MetricQueue:
    """The rows of one attempt that wait, in the order of logging.

    Rows of steps that an earlier attempt has published are compared with those, and not sent: a
    row in a registry stays as it is. A row that is missing there is sent, whatever its step.

    Parameters
    ----------
    registry
        With the run open once `open` is called.
    live
        Rows are sent as they come. Else once a checkpoint holds them, and what is compared with
        are also the rows that earlier attempts had not sent.
    check_run
        Raises `RegistryError` where it is the run that the registry does not take: everything
        would be refused then, and none of it may be left out.
    """

    def __init__(
        self,
        registry: Registry,
        fence: Fence,
        on_event: EventSink,
        check_run: Callable[[], None],
        *,
        live: bool = True,
    ) -> None:
        self._registry = registry
        self._fence = fence
        self._on_event = on_event
        self._check_run = check_run
        self._live = live
        self._arrived: deque[MetricRow] = deque()  # to be compared, unless they are live
        self._held: deque[MetricRow | str] = deque()  # and the checkpoints that follow them
        self._ready: deque[MetricRow] = deque()
        self._high_water: Mapping[str, int] = {}
        self._first_values = FirstValues(self._history, {})
        self._audit = ReplayAudit()
        self._refused_keys: set[str] = set()
        self._unread_keys: set[str] = set()
        self._unsent: Mapping[tuple[str, int], MetricRow] = {}
        self._last_step = -1
        self._has_passed = False

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, rows: Iterable[MetricRow]) -> None:
        """Queue what this attempt has logged."""
        if self._live:
            self._ready.extend(rows)
            return
        rows = list(rows)
        self._arrived.extend(rows)
        self._held.extend(rows)

    def add_save(self, checkpoint: str) -> None:
        """All rows until now will be in this checkpoint."""
        if not self._live:
            self._held.append(checkpoint)

    def release(self, checkpoint: str) -> None:
        """It is committed, and so are its rows."""
        while checkpoint in self._held:
            while (row := self._held.popleft()) != checkpoint:
                if isinstance(row, MetricRow):
                    self._ready.append(row)

    def release_all(self) -> None:
        """No attempt will do the steps of what is held again."""
        self._ready.extend(self.tail)
        self._held.clear()

    @property
    def tail(self) -> list[MetricRow]:
        """Rows that no checkpoint holds; none where they are sent live."""
        return [row for row in self._held if isinstance(row, MetricRow)]

    @property
    def unsent(self) -> list[MetricRow]:
        """All rows that wait."""
        return [*self._ready, *self.tail]

    def open(
        self,
        high_water: Mapping[str, int],
        bounds: Mapping[str, int],
        backlog: Sequence[MetricRow],
        unsent: Mapping[tuple[str, int], MetricRow] | None = None,
    ) -> None:
        """Begin to send.

        Parameters
        ----------
        high_water
            The highest step of each metric in the registry.
        bounds
            The same, before this attempt had sent anything.
        backlog
            What earlier attempts have committed, and left unsent.
        unsent
            What they had not committed, by metric and step.
        """
        self._unsent = unsent or {}
        self._high_water = high_water
        self._first_values = FirstValues(self._history, bounds)
        unsent_step = max((step for _, step in self._unsent), default=-1)
        self._last_step = max(self._first_values.last_step, unsent_step)
        self._ready.extendleft(reversed(backlog))

    @property
    def replay(self) -> Replay:
        """What the steps that were done again have shown until now."""
        return self._audit.replay

    @property
    def has_passed(self) -> bool:
        """Whether a step has been logged that no earlier attempt had come to."""
        return self._has_passed

    def send(self) -> None:
        """Send or compare all that waits.

        What has been counted is not counted again, should a call fail and be repeated: rows leave
        the queue together with that.
        """
        while self._arrived:
            row = self._arrived[0]
            first = self._unsent.get((row.key, row.step)) or self._find(row)
            self._count(self._arrived.popleft(), first)
        while self._ready:
            batch = [self._ready[i] for i in range(min(BATCH_ROWS, len(self._ready)))]
            found = [self._find(row) for row in batch]
            new = [row for row, first in zip(batch, found, strict=True) if first is None]
            new = [row for row in new if not self._was_sent(row)]
            if new:
                self._fence.check()
                self._send(new)
            for first in found:
                row = self._ready.popleft()
                if self._live:
                    self._count(row, first)

    def _count(self, row: MetricRow, first: MetricRow | None) -> None:
        if first is not None and row.key not in self._unread_keys:
            self._audit.compare(first, row)
        self._has_passed |= row.step > self._last_step

    def _find(self, row: MetricRow) -> MetricRow | None:
        """What was logged first; the row itself where the registry refuses to tell that."""
        if row.key not in self._unread_keys:
            try:
                return self._first_values.find(row)
            except RegistryRefusedError as error:
                self._check_run()
                self._unread_keys.add(row.key)
                self._on_event(
                    Warned(
                        message=f"steps that were done again are not compared by {row.key!r}, for "
                        f"the registry refuses to return what it holds of it: {error}"
                    )
                )
        return row if self._first_values.bounds(row) else None

    def _was_sent(self, row: MetricRow) -> bool:
        """By a registrar of this attempt that has died: in order, so up to the highest step."""
        beyond = not self._first_values.bounds(row)
        return beyond and row.step <= self._high_water.get(row.key, -1)

    def _send(self, rows: Sequence[MetricRow]) -> None:
        """Send rows; those that the registry refuses are searched by halves, told, left out."""
        try:
            self._registry.log_metrics(rows)
        except RegistryRefusedError as error:
            if len(rows) > 1:
                half = len(rows) // 2
                self._send(rows[:half])
                self._send(rows[half:])
                return
            self._check_run()
            self._tell_refused(rows[0], error)

    def _history(self, key: str, first: int, last: int) -> Sequence[MetricRow]:
        return self._registry.history(key, first - 1, last)

    def _tell_refused(self, row: MetricRow, error: RegistryRefusedError) -> None:
        if row.key in self._refused_keys:
            return
        self._refused_keys.add(row.key)
        self._on_event(
            Warned(
                message=f"the registry refuses the metric {row.key!r} of step {row.step}, and "
                f"perhaps of others; checkpoints keep it: {error}"
            )
        )
