"""Faults at chosen operations: what they are, and who counts the operations and lets them strike.

One `FaultInjector` may stand behind several wrappers (`FaultyStore`, `FaultyRegistry`,
`FaultyFiles`), so that all operations of a process have one numbering::

    injector = FaultInjector([Fault(at=17, how="kill")], counted=OPERATIONS | REGISTRY_OPERATIONS)
    store = FaultyStore(store, injector)
    registry = FaultyRegistry(registry, injector)

Run once without faults: `FaultInjector.log` tells how many operations there are. Then run again for
each of them, with each fault, and look at what is left. `ckpt_tasks.testing.sweep` does so.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from ckpt_tasks.errors import CkptTasksError

__all__ = ["Fault", "FaultInjector"]

T = TypeVar("T")

MakeError = Callable[[str], Exception]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong at which operation.

    Parameters
    ----------
    at
        Number of the operation among those that are counted, from 1.
    when
        ``before``: it does not take effect. ``during``: a write stops after half of its bytes;
        as ``before`` for the others. ``after``: it takes effect, and its answer is lost.
        ``late``: it fails now, and takes effect after `delay` more counted operations, or at
        `FaultInjector.land`.
    how
        ``raise``: the error that such an operation raises. ``timeout``: the same, after `seconds`,
        with a `TimeoutError` as its cause. ``kill``: this process, with SIGKILL. ``stall``:
        nothing for `seconds`, and then it goes on as if nothing had been, as in a process that was
        stopped.
    times
        How many operations from `at` on meet this fate.
    delay
        See ``late``.
    seconds
        See ``timeout`` and ``stall``.
    """

    at: int
    when: Literal["before", "during", "after", "late"] = "before"
    how: Literal["raise", "timeout", "kill", "stall"] = "raise"
    times: int = 1
    delay: int = 1
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.when == "late" and self.how == "kill":
            raise ValueError("a killed process has no later in which a put could land")
        if self.when in ("late", "during") and self.how == "stall":
            raise ValueError("a process that was stopped goes on: say before or after")


class FaultInjector:
    """Counts operations, and lets faults strike them. Thread-safe.

    Parameters
    ----------
    faults
        What goes wrong; none, to count only.
    counted
        The operations that count. Default: all.
    sleep
        Called with the seconds of a ``timeout`` or ``stall``; a `FakeClock`'s makes the wait a
        number, and a test's own one may wait for whatever it likes.

    Attributes
    ----------
    log
        (operation, subject) of each counted operation that was asked for, in order. The subject is
        a path or an id.
    """

    def __init__(
        self,
        faults: Iterable[Fault] = (),
        *,
        counted: Collection[str] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.faults = list(faults)
        self.log: list[tuple[str, str]] = []
        self._counted = None if counted is None else frozenset(counted)
        self._sleep = sleep
        self._late: list[tuple[int, Callable[[], object]]] = []
        self._lock = threading.Lock()

    def run(
        self,
        operation: str,
        subject: str,
        call: Callable[[], T],
        *,
        error: MakeError,
        half: Callable[[Callable[[], NoReturn]], T] | None = None,
    ) -> T:
        """Do an operation by `call`, unless a fault strikes it.

        Parameters
        ----------
        error
            Makes, from a message, the error that such an operation raises.
        half
            Does half of the operation, and then calls what it is given, which does not return.
        """
        if self._counted is not None and operation not in self._counted:
            return call()
        number = self._count(operation, subject)
        fault = next((f for f in self.faults if f.at <= number < f.at + f.times), None)
        if fault is None:
            return call()
        if fault.how == "stall":
            return self._stall(fault, call)

        def strike() -> NoReturn:
            self._strike(fault, operation, subject, error)

        if fault.when == "during" and half is not None:
            return half(strike)
        if fault.when == "after":
            call()
        elif fault.when == "late":
            with self._lock:
                self._late.append((number + fault.delay, call))
        return strike()

    def land(self) -> None:
        """Let all that is late take effect now; what is then refused is lost."""
        self._land(lambda due: True)

    def _count(self, operation: str, subject: str) -> int:
        with self._lock:
            self.log.append((operation, subject))
            number = len(self.log)
        self._land(lambda due: due <= number)
        return number

    def _stall(self, fault: Fault, call: Callable[[], T]) -> T:
        if fault.when == "before":
            self._sleep(fault.seconds)
            return call()
        result = call()
        self._sleep(fault.seconds)
        return result

    def _strike(self, fault: Fault, operation: str, subject: str, error: MakeError) -> NoReturn:
        if fault.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        what = f"injected fault {fault.when} {operation} of {subject} (operation {fault.at})"
        if fault.how == "timeout":
            self._sleep(fault.seconds)
            raise error(f"no answer within {fault.seconds:g} s: {what}") from TimeoutError(what)
        raise error(what)

    def _land(self, is_due: Callable[[int], bool]) -> None:
        with self._lock:
            due = [call for number, call in self._late if is_due(number)]
            self._late = [entry for entry in self._late if not is_due(entry[0])]
        for call in due:
            try:
                call()
            except (CkptTasksError, OSError):
                continue  # its sender was told of a failure long ago
