"""A store whose objects grow older when a test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ckpt_tasks.fencing.process import this_uptime
from ckpt_tasks.format.records import Uptime
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.testing.wrappers import Operation

_CLOCK_TICK = 0.02  # seconds by which the time of a file may lie behind that of the clock


class AgedStore(WrapperStore):
    """`age` makes all that lies in it older; what is written afterwards is new."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._older_by: dict[str, float] = {}
        self._passed = 0.0
        self._aged_at = 0.0
        self._lock = threading.Lock()

    def age(self, seconds: float) -> None:
        self._passed += seconds
        self.set_clock(seconds)

    def uptime(self) -> Uptime | None:
        """The time by this machine's own clock, with what has passed."""
        here = this_uptime()
        return here and msgspec.structs.replace(here, seconds=here.seconds + self._passed)

    def set_clock(self, seconds: float) -> None:
        """Set the store's clock forward, or back: no time passes."""
        with self._lock:
            self._aged_at = time.time()
            for info in self.store.list_objects(""):
                self._older_by[info.path] = self._older_by.get(info.path, 0.0) + seconds

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        return [self._aged(info) for info in super().list_objects(prefix)]

    def list_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        """As `abort_uploads`."""
        return super().list_uploads(prefix, min(older_than, self._since_aged()))

    def abort_uploads(
        self,
        prefix: str,
        older_than: float,
        *,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> list[UploadInfo]:
        """What was begun before the last `age` is old."""
        return super().abort_uploads(prefix, min(older_than, self._since_aged()), chosen=chosen)

    def _since_aged(self) -> float:
        return time.time() - self._aged_at + _CLOCK_TICK

    def _aged(self, info: ObjectInfo) -> ObjectInfo:
        assert info.modified is not None
        older = self._older_by.get(info.path, 0.0)
        return ObjectInfo(info.path, info.size, info.modified - older)

    def _run(self, operation: Operation, path: str, call: Callable[[], Any]) -> Any:
        if operation in ("create", "put", "write", "replace"):
            with self._lock:
                result = call()
                self._older_by.pop(path, None)
            return result
        return call()
