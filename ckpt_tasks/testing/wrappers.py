"""Stores around a store: one that passes on, one that fails as told, one that is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NoReturn, TypeVar

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo
from ckpt_tasks.testing.faults import Fault, FaultInjector

__all__ = [
    "CHANGES",
    "OPERATIONS",
    "FaultyStore",
    "LatencyStore",
    "Operation",
    "WrapperStore",
]

Operation = Literal[
    "read", "read_range", "read_into", "create", "put", "write", "replace", "exists", "size",
    "list_objects", "list_folders", "delete", "list_uploads", "abort_uploads",
]  # fmt: skip

CHANGES: frozenset[Operation] = frozenset(
    {"create", "put", "write", "replace", "delete", "abort_uploads"}
)
"""Operations that change the store."""

OPERATIONS: frozenset[Operation] = CHANGES | {
    "read", "read_range", "read_into", "exists", "size", "list_objects", "list_folders",
    "list_uploads",
}  # fmt: skip

_STREAMED: frozenset[Operation] = frozenset({"write", "replace"})

T = TypeVar("T")


class WrapperStore(Store):
    """Passes every operation on to `store`. Subclasses override `_run`, or single methods.

    Parameters
    ----------
    store
        The store that does the work.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        self.supports_conditional_create = store.supports_conditional_create
        self.is_shared = store.is_shared
        self.is_mounted = store.is_mounted

    def _run(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        """Every operation passes here; `call` does it."""
        return call()

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        return self._run("read", path, lambda: self.store.read(path, limit=limit))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._run("read_range", path, lambda: self.store.read_range(path, start, stop))

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        self._run("read_into", path, lambda: self.store.read_into(path, start, stop, buffer))

    def create(self, path: str, data: bytes) -> None:
        self._run("create", path, lambda: self.store.create(path, data))

    def put(self, path: str, data: bytes) -> None:
        self._run("put", path, lambda: self.store.put(path, data))

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._run("write", path, lambda: self.store.write(path, parts, size))

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._run("replace", path, lambda: self.store.replace(path, parts, size))

    def exists(self, path: str) -> bool:
        return self._run("exists", path, lambda: self.store.exists(path))

    def size(self, path: str) -> int:
        return self._run("size", path, lambda: self.store.size(path))

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        return self._run("list_objects", prefix, lambda: self.store.list_objects(prefix))

    def list_folders(self, prefix: str) -> list[str]:
        return self._run("list_folders", prefix, lambda: self.store.list_folders(prefix))

    def delete(self, path: str) -> None:
        self._run("delete", path, lambda: self.store.delete(path))

    def list_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        return self._run(
            "list_uploads", prefix, lambda: self.store.list_uploads(prefix, older_than)
        )

    def abort_uploads(
        self,
        prefix: str,
        older_than: float,
        *,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> list[UploadInfo]:
        return self._run(
            "abort_uploads",
            prefix,
            lambda: self.store.abort_uploads(prefix, older_than, chosen=chosen),
        )

    def close(self) -> None:
        self.store.close()


class FaultyStore(WrapperStore):
    """Fails, or kills or stalls the process, at chosen operations, and counts them.

    Parameters
    ----------
    store
        The store that does the work.
    faults
        What goes wrong; none, to count only. Or what counts the operations of other things, too.
    counted
        The operations that count, where `faults` does not say. Default: those that change the
        store.
    """

    def __init__(
        self,
        store: Store,
        faults: Iterable[Fault] | FaultInjector = (),
        *,
        counted: Collection[str] = CHANGES,
    ) -> None:
        super().__init__(store)
        if not isinstance(faults, FaultInjector):
            faults = FaultInjector(faults, counted=counted)
        self.injector = faults

    @property
    def faults(self) -> list[Fault]:
        """What is still to go wrong; a test may change it as it goes."""
        return self.injector.faults

    @property
    def log(self) -> list[tuple[str, str]]:
        """(operation, path) of each counted operation that was asked for, in order."""
        return self.injector.log

    @property
    def count(self) -> int:
        """Counted operations so far."""
        return len(self.log)

    def land(self) -> None:
        """Let all that is late take effect now; what the store then refuses is lost."""
        self.injector.land()

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._stream("write", self.store.write, path, parts, size)

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._stream("replace", self.store.replace, path, parts, size)

    def _stream(
        self,
        operation: Operation,
        write: Callable[[str, Iterable[Any], int], None],
        path: str,
        parts: Iterable[Any],
        size: int,
    ) -> None:
        if any(fault.when == "late" for fault in self.injector.faults):
            parts = [bytes(part) for part in parts]  # their memory may be used again by then

        def write_half(strike: Callable[[], NoReturn]) -> None:
            write(path, _half(parts, size, strike), size)
            strike()  # a store that asked for no more than it needs

        self.injector.run(
            operation,
            path,
            lambda: write(path, parts, size),
            error=StoreError,
            half=write_half,
        )

    def _run(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        return self.injector.run(operation, path, call, error=StoreError)


def _half(parts: Iterable[Any], size: int, strike: Callable[[], None]) -> Iterator[Any]:
    """The first half of the bytes, and then the fault."""
    left = size // 2
    for part in parts:
        view = memoryview(part).cast("B")
        if view.nbytes >= left:
            yield view[:left]
            break
        yield view
        left -= view.nbytes
    strike()


class LatencyStore(WrapperStore):
    """Answers late.

    Parameters
    ----------
    store
        The store that does the work.
    seconds
        Added to each operation.
    bytes_per_second
        If given, a `write` or `replace` takes at least as long as its size at this speed.
    operations
        Which operations are slow. Default: all.
    sleep
        Called with seconds; a `FakeClock`'s makes the wait a number.
    """

    def __init__(
        self,
        store: Store,
        *,
        seconds: float = 0.0,
        bytes_per_second: float | None = None,
        operations: Collection[Operation] = OPERATIONS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(store)
        self._seconds = seconds
        self._bytes_per_second = bytes_per_second
        self._operations = frozenset(operations)
        self._sleep = sleep

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._sleep_for(size)
        super().write(path, parts, size)

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        self._sleep_for(size)
        super().replace(path, parts, size)

    def _sleep_for(self, size: int) -> None:
        if self._bytes_per_second is not None:
            self._sleep(size / self._bytes_per_second)

    def _run(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        if operation in self._operations and self._seconds:
            self._sleep(self._seconds)
        return call()
