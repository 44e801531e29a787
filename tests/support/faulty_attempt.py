"""The stores and the registry of one child of `attempt_forks`, with faults at any operation."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
from support.aged_store import AgedStore
from support.gathering_store import GatheringStore
from support.inline_registrar import InlineRegistrar

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.events import EventSink
from ckpt_tasks.registry import Registry, load_registry
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing import (
    Fault,
    FaultInjector,
    FaultyRegistry,
    FaultyStore,
    FileRegistry,
    faulty_files,
)
from ckpt_tasks.testing.faults import MakeError
from ckpt_tasks.testing.files import FILE_OPERATIONS
from ckpt_tasks.testing.wrappers import CHANGES
from ckpt_tasks.training.spec import TrainSpec

WRITER_FAULTS = "FAULTY_WRITER"
STRUCK = "struck.json"
"""File of a child's folder with the operation that a fault has struck."""


class StoreFault(msgspec.Struct, frozen=True, kw_only=True):
    """A `ckpt_tasks.testing.Fault` of a child; a ``stall`` lasts until `Fork.let_go`."""

    at: int
    when: Literal["before", "during", "after", "late"] = "before"
    how: Literal["raise", "timeout", "kill", "stall"] = "raise"
    times: int = 1


class FaultyAttempt:
    """What a child opens.

    Parameters
    ----------
    folder
        The child's.
    faults, counted
        As `FaultInjector` takes them; by default the changes of the store count. Where `counted`
        names operations of a file system, those of a local store do.
    registers, ages
        Whether the child does a registrar's work, too, and what it finds is old.
    failures
        Where ranks tell one another of saves that fail, if the child is one of several.
    """

    def __init__(
        self,
        folder: Path,
        faults: Sequence[StoreFault],
        counted: Collection[str] | None,
        *,
        registers: bool = False,
        ages: bool = True,
        failures: Path | None = None,
    ) -> None:
        self._folder = folder
        self._failures = failures
        self._registers = registers
        self._ages = ages
        self._counted = CHANGES if counted is None else frozenset(counted)
        self._patches = contextlib.ExitStack()
        self.injector = _TellingInjector(
            folder,
            [Fault(**msgspec.structs.asdict(fault)) for fault in faults],
            counted=self._counted,
            sleep=self._wait,
        )

    def open_store(self, *args: object, **kwargs: object) -> Store:
        """As `ckpt_tasks.store.open_store`."""
        store = FaultyStore(self._opened(*args, **kwargs), self.injector)
        return store if self._failures is None else GatheringStore(store, self._failures)

    def registrar(self, spec: TrainSpec, log: EventSink) -> InlineRegistrar | None:
        """What publishes and retains, where that is asked for."""
        if not self._registers:
            return None

        def open_aged() -> tuple[Store, AgedStore]:
            aged = AgedStore(self._opened(spec.config.store))
            return FaultyStore(aged, self.injector), aged

        def open_faulty() -> Registry:
            return FaultyRegistry(open_registry(spec.config.registry), self.injector)

        return InlineRegistrar(spec, open_aged, open_faulty, log, ages=self._ages)

    def tell(self) -> None:
        """Write down which operations there were, and undo what was done to `os`."""
        self._patches.close()
        path = self._folder / "operations.json"
        path.write_bytes(msgspec.json.encode(self.injector.log))

    def _opened(self, *args: object, **kwargs: object) -> Store:
        store = open_store(*args, **kwargs)  # type: ignore[arg-type]
        if isinstance(store, LocalStore) and self._counted & FILE_OPERATIONS:
            self._patches.enter_context(faulty_files(store.root, self.injector))
            self._counted -= FILE_OPERATIONS  # once is enough
        return store

    def _wait(self, seconds: float) -> None:
        """A time-out is not waited for; a stall lasts until the test says go."""
        if any(fault.how == "stall" for fault in self.injector.faults):
            hold(self._folder)


class _TellingInjector(FaultInjector):
    """Tells of a strike in a file, as who was struck may not live to tell what it has done."""

    def __init__(self, folder: Path, faults: Sequence[Fault], **options: Any) -> None:
        super().__init__(faults, **options)
        self._folder = folder

    def _strike(self, fault: Fault, operation: str, subject: str, error: MakeError) -> NoReturn:
        (self._folder / STRUCK).write_bytes(msgspec.json.encode((operation, subject)))
        super()._strike(fault, operation, subject, error)


def open_registry(config: RegistryConfig) -> Registry:
    """The registry that a configuration names; of the kind ``file``, one that is a file."""
    if config.kind == "file":
        assert config.tracking_uri is not None
        return FileRegistry(Path(config.tracking_uri))
    return load_registry(config)


def hold(folder: Path) -> None:
    """Stand still until the test says go, or has ended and taken the folder along."""
    (folder / "held").touch()
    while (folder / "held").exists() and not (folder / "go").exists():
        time.sleep(0.01)


class WriterFaults(msgspec.Struct, frozen=True, kw_only=True):
    """Faults of the first writer's process that a child starts, in its environment."""

    folder: str
    faults: list[StoreFault]
    counted: list[str]
    failures: str | None = None


def break_writer() -> None:
    """In the process of a writer: have its store fail as the environment says."""
    told = msgspec.json.decode(os.environ[WRITER_FAULTS], type=WriterFaults)
    folder = Path(told.folder)
    try:
        (folder / "writer").touch(exist_ok=False)
    except FileExistsError:  # the first writer has died of it
        return
    from ckpt_tasks.store import open as opening

    failures = None if told.failures is None else Path(told.failures)
    faulty = FaultyAttempt(folder, told.faults, told.counted, failures=failures)
    opening.open_store = faulty.open_store  # type: ignore[assignment]
    import atexit

    atexit.register(faulty.tell)
