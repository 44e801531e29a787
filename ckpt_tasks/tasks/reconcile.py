"""Make store and registry agree after any outage: the store is the truth.

A run whose attempt is alive is left to that attempt's registrar, which finds all the same
differences when it begins. For any other, what is missing is published as its registrar would
have done, in the name of the newest attempt, so that it stops as soon as another one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ckpt_tasks.checkpointer.catalog import list_run_names, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.tasks.patience import Patience
from ckpt_tasks.tasks.reconciliation import ReconcileReport, Reconciliation

__all__ = ["ReconcileReport", "Tell", "reconcile", "reconcile_all", "reconcile_each"]

_AT_ONCE = 64
"""Runs that are held in memory, and whose heartbeats are watched, at the same time."""

Tell = Callable[[str], None]


def reconcile(
    config: CheckpointConfig, run: str, *, dry_run: bool = False, tell: Tell | None = None
) -> ReconcileReport:
    """Make the registry hold of a run what the store has, and remove what nothing needs.

    Parameters
    ----------
    config
        Names the store, the registry if there is one, how long an attempt may be silent
        (``attempt.takeover_after``), and the grace of a collection (``retention.grace``).
    dry_run
        Change nothing: the report is the plan.
    tell
        Told in a sentence what is waited for.

    Returns
    -------
    ReconcileReport
        Also where the registry or storage failed on the way: `ReconcileReport.problem` says so,
        and what was done until then stays done. Worth repeating.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    ConfigError
        The configuration cannot work.
    StoreError
        Storage did not answer at first.
    """
    store = open_existing_store(config.store)
    try:
        reconciliation = Reconciliation(store, config, view_run(store, run), dry_run=dry_run)
        return _Several(config, tell).reconcile([reconciliation])[0]
    finally:
        store.close()


def reconcile_all(
    config: CheckpointConfig, *, dry_run: bool = False, tell: Tell | None = None
) -> list[ReconcileReport]:
    """`reconcile` every run of a store; what fails for one run stands in its report."""
    store = open_existing_store(config.store)
    try:
        names = list_run_names(store)
        reports = reconcile_each(store, config, names, dry_run=dry_run, tell=tell)
        return sorted(reports, key=lambda report: report.run)
    finally:
        store.close()


def reconcile_each(
    store: Store,
    config: CheckpointConfig,
    runs: Sequence[str],
    *,
    dry_run: bool = False,
    collects: bool = True,
    tell: Tell | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ReconcileReport]:
    """`reconcile` these runs, some at a time, so that memory is bounded however many there are.

    Parameters
    ----------
    runs
        Their names.
    collects
        Whether also to remove what nothing needs.

    Yields
    ------
    ReconcileReport
        Of each; what fails for one run stands in its report. A registry that fails for one run
        after the other, and takes its time to do so, is not asked about the rest.
    """
    several = _Several(config, tell, clock)
    for start in range(0, len(runs), _AT_ONCE):
        found: list[Reconciliation] = []
        for run in runs[start : start + _AT_ONCE]:
            try:
                view = view_run(store, run)
            except CkptTasksError as error:
                yield ReconcileReport(run=run, dry_run=dry_run, problem=str(error))
            else:
                found.append(
                    Reconciliation(store, config, view, dry_run=dry_run, collects=collects)
                )
        yield from several.reconcile(found)


class _Several:
    """Looks at several runs, watches all that may be alive at once, then acts on each in turn."""

    def __init__(
        self,
        config: CheckpointConfig,
        tell: Tell | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._tell = tell
        self._patience = Patience(clock)

    def reconcile(self, runs: Sequence[Reconciliation]) -> list[ReconcileReport]:
        for run in runs:
            self._look(run)
        self._watch([run for run in runs if run.must_be_watched])
        for run in runs:
            run.act()
        return [run.report for run in runs]

    def _look(self, run: Reconciliation) -> None:
        if self._patience.is_over:
            run.report.problem = str(self._patience)
            return
        self._patience.begin()
        run.look()
        self._patience.end(failed=run.report.problem is not None)

    def _watch(self, doubtful: Sequence[Reconciliation]) -> None:
        if not doubtful:
            return
        if self._tell is not None:
            after = self._config.attempt.takeover_after
            count = len(doubtful)
            self._tell(f"watching the heartbeat of {count} attempt(s) for up to {after:g} s")
        with ThreadPoolExecutor(len(doubtful)) as pool:
            list(pool.map(Reconciliation.watch, doubtful))
