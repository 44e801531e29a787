"""Retention beside a training: after each commit what is no longer kept is marked, and what has
expired long enough ago is removed.

In a thread of the registrar, so that neither training nor publishing waits for it. A collection
may read a whole checkpoint, and cut short it is completed by the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import (
    CkptTasksError,
    RegistryError,
    StaleAttemptError,
)
from ckpt_tasks.events import EventSink, RetentionApplied, Warned
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import RegistryRunIds
from ckpt_tasks.registry import Registry, RunDescription, load_registry
from ckpt_tasks.retention import collect, expire
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.registration.registry_ids import read_ids

__all__ = ["Retainer"]

_COLLECTIONS_IN_A_GRACE = 4


class Retainer:
    """Applies the retention of one attempt, whenever it is woken.

    Parameters
    ----------
    attempt
        In whose name it is done; once it is stale, nothing more is.
    describe
        Tells of the run, to find it in the registry.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        attempt: int,
        config: CheckpointConfig,
        describe: Callable[[], RunDescription],
        on_event: EventSink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._layout = layout
        self._fence = Fence(store, layout, attempt)
        self._by = f"attempt {attempt}"
        self._config = config
        self._describe = describe
        self._on_event = on_event
        self._clock = clock
        self._registry: Registry | None = None
        self._began, self._began_at = clock(), datetime.now(UTC)
        self._collect_at = clock()
        self._told: str | None = None
        self._woken = threading.Event()
        self._needs_room = False
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def wake(self, *, needs_room: bool = False) -> None:
        """There may be something to do; `needs_room` where a save found no room: what may be
        removed is removed at once.
        """
        self._needs_room |= needs_room
        self._woken.set()

    def finish(self, *, within: float) -> None:
        """Mark what the last commit lets go, and end; a collection under way is left to the next
        attempt after so many seconds.
        """
        self._ends = True
        self._woken.set()
        self._thread.join(within)

    def _run(self) -> None:
        try:
            last = False
            while not last:
                self._woken.wait()
                self._woken.clear()
                last = self._ends
                self._apply()
        except StaleAttemptError:
            return  # the registrar finds out, and tells
        finally:
            if self._registry is not None:
                self._registry.close()

    def _apply(self) -> None:
        try:
            self._expire_and_collect()
        except StaleAttemptError:
            raise
        except CkptTasksError as error:
            self._tell(str(error))

    def _tell(self, why: str) -> None:
        """Once, however often it is tried again."""
        if why != self._told:
            self._told = why
            self._on_event(Warned(message=f"retention removes nothing for now: {why}"))

    def _expire_and_collect(self) -> None:
        store, run, retention = self._store, self._layout.run, self._config.retention
        registry = self._bound_registry()
        planned = expire(
            store,
            run,
            retention,
            by=self._by,
            registry=registry,
            fence=self._fence,
            now=self._now(),
        )
        expired = [verdict.checkpoint for verdict in planned.to_expire]
        removed: list[str] = []
        freed = 0
        needs_room, self._needs_room = self._needs_room, False
        if not self._ends and (needs_room or self._clock() >= self._collect_at):
            self._collect_at = self._clock() + retention.grace / _COLLECTIONS_IN_A_GRACE
            report = collect(
                store,
                run,
                grace=retention.grace,
                by=self._by,
                registry=registry,
                fence=self._fence,
            )
            removed, freed = report.removed, report.freed
            if report.refused is not None:
                self._tell(report.refused)
        if expired or removed:
            self._on_event(RetentionApplied(expired=expired, removed=removed, freed=freed))

    def _now(self) -> datetime:
        """For rules that go by age: the time since this began, on the clock as it was then, for
        it may be set while a training runs.
        """
        return self._began_at + timedelta(seconds=self._clock() - self._began)

    def _bound_registry(self) -> Registry | None:
        """A registry of this thread's own; raises `RegistryError` before the run is in it."""
        config = self._config.registry
        if config.tracking_uri is None:
            return None
        if self._registry is None:
            registry = load_registry(config)
            registry.attach_run(self._ids(registry.name), self._describe())
            self._registry = registry
        return self._registry

    def _ids(self, registry: str) -> RegistryRunIds:
        # Damaged ones the publisher tells of, and replaces.
        ids = read_ids(self._store, self._layout, registry, lambda _: None)
        if ids is None:
            raise RegistryError("the run is not in the registry yet")
        return ids
