"""The benchmark: everything about one state on one store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_tasks.bench.contestants import OURS, Ours, peers
from ckpt_tasks.bench.limits import Limits
from ckpt_tasks.bench.measure import Measured, alternate
from ckpt_tasks.bench.report import BenchReport, figures_of, interval
from ckpt_tasks.bench.states import make_state
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.state.capture import capture
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.local import LocalStore

__all__ = ["run_bench"]

_PEER = {"save": "torch.save + fsync", "load": "torch.load"}


def run_bench(
    config: StoreConfig, state: str, *, rounds: int, mean_time_between_failures: float
) -> BenchReport:
    """Measure; what is written is removed again.

    Parameters
    ----------
    config
        The store. Peers write beside it where it is a folder, else to a temporary one.
    state
        Name of a state; see `STATES`.
    rounds
        How often each is measured.
    mean_time_between_failures
        Seconds, for the interval that is recommended.

    Raises
    ------
    ConfigError
        No such state, or the store cannot be used.
    StoreError
        Storage failed.
    """
    items = make_state(state)
    with _scratch(config) as (store, folder):
        limits = Limits(store, capture(items))
        ours = Ours(store, items)
        try:
            raw = alternate(limits.contestants(), rounds)
            saving, loading, missing = peers(folder, items)
            saves = alternate([ours.save(), *saving], rounds)
            # What is loaded, and as much again for those that read through the page cache.
            loads = alternate(
                [ours.load(), ours.load_model(), *loading], rounds, memory=2 * limits.size
            )
        finally:
            ours.remove()
            limits.remove()
    return BenchReport(
        state=state,
        size=limits.size,
        rounds=rounds,
        limits=figures_of(raw, limits.size, against=None),
        saves=figures_of(saves, limits.size, against=_PEER["save"]),
        loads=figures_of(loads, limits.size, against=_PEER["load"]),
        bound=_bound(raw, saves[OURS]),
        every=interval(saves[OURS].median, mean_time_between_failures),
        missing=missing,
    )


@contextmanager
def _scratch(config: StoreConfig) -> Iterator[tuple[Store, Path]]:
    """A store to write to, on the same storage, and a folder for peers, beside it if it is one."""
    with open_store(config, for_writing=True) as store:
        beside = store.root if isinstance(store, LocalStore) else None
        with tempfile.TemporaryDirectory(prefix=".ckpt-tasks-bench-", dir=beside) as folder:
            own = LocalStore(str(Path(folder, "store"))) if beside else store
            yield own, Path(folder)


def _bound(raw: dict[str, Measured], save: Measured) -> str:
    """Which of the bare operations takes most of a save's time."""
    parts = {name: raw[name].median for name in ("copy", "hash", "raw write")}
    slowest = max(parts, key=lambda name: parts[name])
    what = {"copy": "copying the state", "hash": "digests", "raw write": "writing to the store"}
    return (
        f"{what[slowest]} bounds a save: {parts[slowest]:.3f} s alone, of {save.median:.3f} s "
        f"({save.median / parts[slowest]:.2f} times)"
    )
