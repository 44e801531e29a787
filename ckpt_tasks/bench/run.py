"""The benchmark: everything about one state on one store."""

from __future__ import annotations

import contextlib
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ckpt_tasks.bench.advice import advise
from ckpt_tasks.bench.asynchronous import OursAsync, alternate_async
from ckpt_tasks.bench.incremental import measure_resaves
from ckpt_tasks.bench.limits import Limits
from ckpt_tasks.bench.measure import Measured, alternate
from ckpt_tasks.bench.memory import measure_memory, resident
from ckpt_tasks.bench.ours import OURS, Ours
from ckpt_tasks.bench.peers import DCP_PROCESS, peers, torch_save
from ckpt_tasks.bench.places import FsspecPlace, LocalPlace, Place
from ckpt_tasks.bench.planning import planning_seconds
from ckpt_tasks.bench.report import (
    AsyncFigure,
    BenchReport,
    Memory,
    async_figures_of,
    figures_of,
)
from ckpt_tasks.bench.states import make_state
from ckpt_tasks.bench.training import AsyncSave, NotMeasuredError, Training
from ckpt_tasks.config import SaveConfig, StoreConfig
from ckpt_tasks.state.capture import capture
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.store.open import shown_place

__all__ = ["run_bench"]

_LIMIT_SECONDS = 300.0  # for an asynchronous save to become durable
_MEMORY_SAVES = 4
_PREFIX = ".ckpt-tasks-bench-"

Save = TypeVar("Save", bound=AsyncSave)

_OURS = {OURS: SaveConfig(), f"{OURS}, overlapped": SaveConfig(overlap=True)}
"""Ways of saving asynchronously that this package has; the first is the default one."""


class _Scratch(NamedTuple):
    """Where a benchmark writes: a store of ours, how to open it again, a place for peers on the
    same storage, and a local folder.
    """

    store: Store
    config: StoreConfig
    place: Place
    folder: Path


def run_bench(
    config: StoreConfig,
    state: str,
    *,
    rounds: int,
    mean_time_between_failures: float,
    limit: float = _LIMIT_SECONDS,
) -> BenchReport:
    """Measure; what is written is removed again, and what is started is ended.

    Parameters
    ----------
    config
        The store. Peers write to the same storage.
    state
        Name of a state, or a size; see `make_state`.
    rounds
        How often each is measured.
    mean_time_between_failures
        Seconds, for the interval that is recommended.
    limit
        Seconds that an asynchronous save may take, before it counts as not measured.

    Raises
    ------
    ConfigError
        No such state, or the store cannot be used.
    StoreError
        Storage failed.
    """
    items = make_state(state)
    with _quiet(), _scratch(config) as scratch, ExitStack() as stack:
        limits = Limits(scratch.store, capture(items))
        stack.callback(limits.close)
        raw = alternate(limits.contestants(), rounds)
        blocking = _measure_blocking(scratch, items, rounds, limits.size)
        resaves = measure_resaves(scratch.store, items, rounds)
        planning = planning_seconds(items, rounds)
        background = _measure_async(scratch, items, limits, rounds, limit)
    return BenchReport(
        state=state,
        size=limits.size,
        tensors=len(capture(items).tensors),
        store=shown_place(config.url),
        rounds=rounds,
        limits=figures_of(raw, limits.size, against=None),
        saves=figures_of(blocking.saves, limits.size, against=torch_save(scratch.place)),
        async_saves=background.figures,
        step=background.step,
        loads=figures_of(blocking.loads, limits.size, against="torch.load"),
        resaves=resaves,
        memory=background.memory,
        planning=planning,
        missing=[*blocking.missing, *background.missing],
        advice=advise(
            raw,
            blocking.saves[OURS].median,
            next((figure for figure in background.figures if figure.name == OURS), None),
            blocking.loads[OURS].median,
            mean_time_between_failures=mean_time_between_failures,
        ),
    )


class _Blocking(NamedTuple):
    saves: dict[str, Measured]
    loads: dict[str, Measured]
    missing: list[str]


def _measure_blocking(
    scratch: _Scratch, items: Mapping[str, Any], rounds: int, size: int
) -> _Blocking:
    ours = Ours(scratch.store, items)
    try:
        save, load = ours.contestants()
        saving, loading, missing = peers(scratch.place, items)
        saves = alternate([save, *saving], rounds)
        loads = alternate([*load, *loading], rounds, memory=size)
    finally:
        ours.close()
    return _Blocking(saves, loads, missing)


class _Background(NamedTuple):
    figures: list[AsyncFigure]
    memory: Memory | None
    step: float | None
    missing: list[str]


def _measure_async(
    scratch: _Scratch, items: Mapping[str, Any], limits: Limits, rounds: int, limit: float
) -> _Background:
    if not scratch.store.is_shared:
        why = "asynchronous saves: no other process can write to this store"
        return _Background([], None, None, [why])
    with ExitStack() as stack:
        before = resident()
        default, *variants = _OURS
        ours = stack.enter_context(_stopped(_ours(scratch, items, default)))
        # Before any other holds memory, too.
        memory = measure_memory(ours, before, limits.size, saves=_MEMORY_SAVES)
        saves: list[AsyncSave] = [ours]
        for name in variants:
            saves.append(stack.enter_context(_stopped(_ours(scratch, items, name))))
        others, missing = _dcp_saves(scratch, items, limit)
        saves.extend(stack.enter_context(_stopped(other)) for other in others)
        training = Training()
        measured = alternate_async(training, saves, limits.copy, rounds, limit=limit)
        step, _ = training.usual()
    figures = async_figures_of(
        measured.saves, limits.size, copies=measured.copies, against=DCP_PROCESS
    )
    return _Background(figures, memory, step, [*missing, *measured.missing])


def _ours(scratch: _Scratch, items: Mapping[str, Any], name: str) -> OursAsync:
    store, opened_by = scratch.store, scratch.config
    return OursAsync(name, store, opened_by, items, save=_OURS[name], scratch=scratch.folder)


@contextmanager
def _stopped(save: Save) -> Iterator[Save]:
    """The same, ended with the context."""
    try:
        yield save
    finally:
        save.stop()


def _dcp_saves(
    scratch: _Scratch, items: Mapping[str, Any], limit: float
) -> tuple[list[AsyncSave], list[str]]:
    """Those that can be measured, and a word on each that cannot."""
    try:
        from ckpt_tasks.bench.dcp import DcpProcess, DcpThread
    except ImportError as error:  # a torch that is built without it
        return [], [f"asynchronous DCP: {error}"]
    saves: list[AsyncSave] = [DcpThread(scratch.place, items)]
    try:
        saves.append(DcpProcess(scratch.place, items, scratch=scratch.folder, limit=limit))
    except NotMeasuredError as error:
        return saves, [f"{DCP_PROCESS}: {error}"]
    return saves, []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warnings, such as that it overwrites, as it is told to; its threads' too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


@contextmanager
def _scratch(config: StoreConfig) -> Iterator[_Scratch]:
    """On the same storage: a folder beside what is there, which is removed afterwards."""
    with _as_it_was(config), open_store(config, for_writing=True) as store:
        if isinstance(store, LocalStore):
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=store.root) as name:
                folder = Path(name)
                own = StoreConfig(url=str(folder / "store"))
                (folder / "peers").mkdir()
                with open_store(own) as ours:
                    yield _Scratch(ours, own, LocalPlace(folder / "peers"), folder)
            return
        place = FsspecPlace(config, f"{_PREFIX}{uuid.uuid4().hex[:8]}")
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
            try:
                yield _Scratch(store, config, place, Path(name))
            finally:
                place.remove("")


@contextmanager
def _as_it_was(config: StoreConfig) -> Iterator[None]:
    """A store's folder that is made for this only is removed again."""
    store = open_store(config)
    root = Path(store.root) if isinstance(store, LocalStore) else None
    store.close()
    is_new = root is not None and not root.exists()
    try:
        yield
    finally:
        if root is not None and is_new:
            with contextlib.suppress(OSError):  # somebody has put something there meanwhile
                root.rmdir()
