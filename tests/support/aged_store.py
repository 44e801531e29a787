"""A store whose objects grow older when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ckpt_tasks.store.base import ObjectInfo, Store
from ckpt_tasks.testing import WrapperStore
from ckpt_tasks.testing.wrappers import Operation


class AgedStore(WrapperStore):
    """`age` makes all that lies in it older; what is written afterwards is new."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._older_by: dict[str, float] = {}
        self._lock = threading.Lock()

    def age(self, seconds: float) -> None:
        with self._lock:
            for info in self.store.list_objects(""):
                self._older_by[info.path] = self._older_by.get(info.path, 0.0) + seconds

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        return [self._aged(info) for info in super().list_objects(prefix)]

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
