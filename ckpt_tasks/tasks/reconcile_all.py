"""Reconciling many runs, some at a time: memory is bounded, however many a store has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from ckpt_tasks.checkpointer.catalog import list_run_names, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.replica import replica_text
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.tasks.patience import Patience
from ckpt_tasks.tasks.reconcile import ReconcileReport, Reconciliation, Tell, reconcile_in_turn

__all__ = ["reconcile_all", "reconcile_each"]

_AT_A_TIME = 64
"""Runs that are in memory, and may be watched, together."""


def reconcile_all(
    config: CheckpointConfig, *, dry_run: bool = False, tell: Tell | None = None
) -> list[ReconcileReport]:
    """`reconcile` every run of a store; what fails for one run stands in its report."""
    with closing(open_existing_store(config.store)) as store:
        names = list_run_names(store)
        reports = reconcile_each(store, config, names, dry_run=dry_run, tell=tell)
        return sorted(reports, key=lambda report: report.run)


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
    """`reconcile` these runs.

    Parameters
    ----------
    runs
        Their names.
    collects
        Whether also to remove what nothing needs any more.

    Yields
    ------
    ReconcileReport
        Of each; what fails for one run stands in its report. A registry that fails for one run
        after the other, and takes long to do so, is not asked about the rest.
    """
    patience = Patience(clock)
    for start in range(0, len(runs), _AT_A_TIME):
        found: list[Reconciliation] = []
        for run in runs[start : start + _AT_A_TIME]:
            report = ReconcileReport(run=run, dry_run=dry_run)
            try:
                view = view_run(store, run)
            except CkptTasksError as error:
                report.problem = str(error)
                yield report
                continue
            if view.run.replica:
                report.notes.append(f"left alone: {replica_text(view.run)}")
                yield report
                continue
            found.append(Reconciliation(store, config, view, dry_run=dry_run, collects=collects))
        yield from reconcile_in_turn(found, config, tell, patience)
