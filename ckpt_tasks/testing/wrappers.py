"""Stores around a store: one that passes on, one that fails as told, one that is slow."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo

__all__ = [
    "CHANGES",
    "OPERATIONS",
    "Fault",
    "FaultyStore",
    "LatencyStore",
    "Operation",
    "WrapperStore",
]

Operation = Literal[
    "read", "read_range", "read_into", "create", "put", "write", "replace", "exists", "size",
    "list_objects", "list_folders", "delete", "abort_uploads",
]  # fmt: skip

CHANGES: frozenset[Operation] = frozenset(
    {"create", "put", "write", "replace", "delete", "abort_uploads"}
)
"""Operations that change the store."""

OPERATIONS: frozenset[Operation] = CHANGES | {
    "read", "read_range", "read_into", "exists", "size", "list_objects", "list_folders",
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

    def abort_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        return self._run(
            "abort_uploads", prefix, lambda: self.store.abort_uploads(prefix, older_than)
        )

    def close(self) -> None:
        self.store.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong at which operation.

    Parameters
    ----------
    at
        Number of the operation among those that `FaultyStore` counts, from 1.
    when
        ``before``: it does not take effect. ``during``: a `write` or `replace` stops after half of
        its bytes; as ``before`` for the others. ``after``: it takes effect, and its answer is lost.
        ``late``: it fails now, and takes effect after `delay` more counted operations, or at
        `FaultyStore.land`.
    how
        ``raise`` a `StoreError`, or ``kill`` this process with SIGKILL.
    times
        How many operations from `at` on meet this fate.
    delay
        See ``late``.
    """

    at: int
    when: Literal["before", "during", "after", "late"] = "before"
    how: Literal["raise", "kill"] = "raise"
    times: int = 1
    delay: int = 1

    def __post_init__(self) -> None:
        if self.when == "late" and self.how == "kill":
            raise ValueError("a killed process has no later in which a put could land")

    def strike(self, operation: Operation, path: str) -> None:
        """Raise, or kill this process."""
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise StoreError(f"injected fault {self.when} {operation} of {path} (operation {self.at})")


class FaultyStore(WrapperStore):
    """Fails, or kills the process, at chosen operations, and counts them.

    Parameters
    ----------
    store
        The store that does the work.
    faults
        What goes wrong; none, to count only.
    counted
        The operations that count. Default: those that change the store.

    Attributes
    ----------
    log
        (operation, path) of each counted operation that was asked for, in order.
    """

    def __init__(
        self,
        store: Store,
        faults: Iterable[Fault] = (),
        *,
        counted: Collection[Operation] = CHANGES,
    ) -> None:
        super().__init__(store)
        self.faults = list(faults)
        self.log: list[tuple[Operation, str]] = []
        self._counted = frozenset(counted)
        self._late: list[tuple[int, Callable[[], object]]] = []
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Counted operations so far."""
        return len(self.log)

    def land(self) -> None:
        """Let all that is late take effect now; what the store then refuses is lost."""
        self._land(lambda due: True)

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
        number = self._count(operation, path)
        fault = self._fault(number)
        if fault is not None and fault.when == "during":
            parts = _half(parts, size, lambda: fault.strike(operation, path))
        elif fault is not None and fault.when == "late":
            parts = [bytes(part) for part in parts]
        self._meet(fault, number, operation, path, lambda: write(path, parts, size))

    def _run(self, operation: Operation, path: str, call: Callable[[], T]) -> T:
        if operation not in self._counted:
            return call()
        number = self._count(operation, path)
        return self._meet(self._fault(number), number, operation, path, call)

    def _count(self, operation: Operation, path: str) -> int:
        if operation not in self._counted:
            return 0
        with self._lock:
            self.log.append((operation, path))
            number = len(self.log)
        self._land(lambda due: due <= number)
        return number

    def _fault(self, number: int) -> Fault | None:
        return next((f for f in self.faults if f.at <= number < f.at + f.times), None)

    def _meet(
        self,
        fault: Fault | None,
        number: int,
        operation: Operation,
        path: str,
        call: Callable[[], T],
    ) -> T:
        if fault is None or (fault.when == "during" and operation in _STREAMED):
            return call()
        if fault.when == "after":
            call()
        elif fault.when == "late":
            with self._lock:
                self._late.append((number + fault.delay, call))
        fault.strike(operation, path)
        raise AssertionError("a fault raises or kills")

    def _land(self, is_due: Callable[[int], bool]) -> None:
        with self._lock:
            due = [call for number, call in self._late if is_due(number)]
            self._late = [entry for entry in self._late if not is_due(entry[0])]
        for call in due:
            try:
                call()
            except StoreError:
                continue  # its sender was told of a failure long ago


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
