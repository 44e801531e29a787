"""Maintenance of a whole store: every run is reconciled, then expired by the rules, then collected.

Each step goes through all runs before the next begins, so that orchestrators show it as a task of
its own; what one did is handed to the next. What goes wrong with one run stands in its line: later
steps leave that run alone, so that nothing of it is deleted, and the others are maintained all the
same. Steps may be repeated, and any number may run at once, beside trainings: what keeps that safe
is in `ckpt_tasks.retention.collect` and in the fence.
"""

from __future__ import annotations

import fnmatch
import socket
from collections.abc import Callable, Sequence
from contextlib import closing

import msgspec

from ckpt_tasks.checkpointer.catalog import list_run_names, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CkptTasksError, MaintenanceError, RegistryError, StoreError
from ckpt_tasks.fencing.claim import read_run
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.masking import mask_url
from ckpt_tasks.retention import collect, expire, plan_run
from ckpt_tasks.retention.inventory import Inventory, take_inventory
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.tasks.patience import Patience
from ckpt_tasks.tasks.reconcile import ReconcileReport, Tell
from ckpt_tasks.tasks.reconcile_all import reconcile_each
from ckpt_tasks.tasks.registered import attached_registry
from ckpt_tasks.tasks.report import Row

__all__ = [
    "Maintenance",
    "RunMaintenance",
    "check_maintained",
    "collect_store",
    "expire_store",
    "maintain",
    "maintenance_rows",
    "reconcile_store",
]


class RunMaintenance(msgspec.Struct, kw_only=True):
    """What was done about one run, or (of a dry run) would be.

    Parameters
    ----------
    registered
        Checkpoints that the registry lacked.
    corrected
        Other differences between store and registry that were removed.
    expired
        Checkpoints that were marked as no longer kept.
    collected
        Checkpoints that were removed.
    freed
        Bytes, those that killed writes had left among them.
    kept, kept_bytes
        Checkpoints that are left, expired ones within their grace among them, and bytes of all the
        run's objects. Of a dry run: that there are now.
    replica
        A read-only copy of a run, which is left alone.
    problem
        Why the run was left alone from then on; ``None`` where nothing stood in the way.
    """

    run: str
    registered: int = 0
    corrected: int = 0
    expired: int = 0
    collected: int = 0
    freed: int = 0
    kept: int = 0
    kept_bytes: int = 0
    replica: bool = False
    problem: str | None = None

    @property
    def changed(self) -> bool:
        return any((self.registered, self.corrected, self.expired, self.collected, self.freed))


class Maintenance(msgspec.Struct, kw_only=True):
    """What was done about the runs of a store.

    Parameters
    ----------
    store
        Its URL, userinfo masked.
    dry_run
        Nothing was changed, only told.
    runs
        By name.
    """

    store: str
    dry_run: bool
    runs: list[RunMaintenance]

    @property
    def problems(self) -> list[RunMaintenance]:
        """Runs of which something went wrong."""
        return [run for run in self.runs if run.problem is not None]

    @property
    def total(self) -> RunMaintenance:
        """All runs as one, without their problems."""
        total = RunMaintenance(run=f"{len(self.runs)} runs")
        for run in self.runs:
            for field in ("registered", "corrected", "expired", "collected", "freed", "kept"):
                setattr(total, field, getattr(total, field) + getattr(run, field))
            total.kept_bytes += run.kept_bytes
        return total

    def __str__(self) -> str:
        total = self.total
        would = "would be " if self.dry_run else ""
        told = [
            f"{total.registered} checkpoints {would}registered",
            f"{total.corrected} other differences {would}removed",
            f"{total.expired} checkpoints {would}expired",
            f"{total.collected} {would}collected ({readable_size(total.freed)})",
            f"{total.kept} left ({readable_size(total.kept_bytes)})",
        ]
        if self.problems:
            told.append(f"{len(self.problems)} runs with problems")
        return f"{total.run}: {'; '.join(told)}"


def maintain(
    config: CheckpointConfig,
    patterns: Sequence[str] = (),
    *,
    dry_run: bool = False,
    tell: Tell | None = None,
) -> Maintenance:
    """Reconcile, expire and collect the runs of a store.

    Parameters
    ----------
    config
        Names the store, the rules and the grace, and the registry if there is one. The rules are
        those of every run: what a training was configured to keep is not recorded in its store.
    patterns
        Names of runs, in which ``*``, ``?`` and ``[...]`` stand for others; none: all runs.
    dry_run
        Change nothing, and tell what would be done. An expiry that it tells is no collection yet.
    tell
        Told in a sentence what is waited for.

    Returns
    -------
    Maintenance
        Also of runs of which something went wrong; see `check_maintained`.

    Raises
    ------
    ConfigError
        The configuration cannot work.
    StoreError
        Storage did not answer at first.
    """
    done = reconcile_store(config, patterns, dry_run=dry_run, tell=tell)
    return collect_store(config, expire_store(config, done))


def reconcile_store(
    config: CheckpointConfig,
    patterns: Sequence[str] = (),
    *,
    dry_run: bool = False,
    tell: Tell | None = None,
) -> Maintenance:
    """The first step: find the runs, and make the registry hold of each what the store has.

    Without a registry, only whether each run's own record can be read is looked at. Arguments and
    errors as `maintain`.
    """
    with closing(open_existing_store(config.store, for_writing=not dry_run)) as store:
        names = [name for name in list_run_names(store) if _matches(name, patterns)]
        runs = [_identified(store, name) for name in names]
        if config.registry.tracking_uri is not None:
            sound = [run.run for run in runs if run.problem is None and not run.replica]
            reports = reconcile_each(
                store, config, sound, dry_run=dry_run, collects=False, tell=tell
            )
            done = {report.run: _reconciled(report) for report in reports}
            runs = [done.get(run.run, run) for run in runs]
    runs.sort(key=lambda run: run.run)
    return Maintenance(store=mask_url(config.store.url), dry_run=dry_run, runs=runs)


def expire_store(config: CheckpointConfig, done: Maintenance) -> Maintenance:
    """The second step: mark what `RetentionConfig` does not keep.

    Parameters
    ----------
    config
        As of `maintain`.
    done
        What the first step returned.

    Raises
    ------
    ConfigError, StoreError
        As `maintain`.
    """
    if config.retention.keeps_everything:
        return done

    def expire_run(store: Store, run: RunMaintenance) -> None:
        inventory = take_inventory(store, RunLayout(run.run))
        if inventory.may_expire and not run.replica:
            _expire(store, config, run, inventory, dry_run=done.dry_run)

    return _each(config, done, expire_run)


def collect_store(config: CheckpointConfig, done: Maintenance) -> Maintenance:
    """The third step: remove what has expired long enough ago, and what killed writes have left.

    Arguments and errors as `expire_store`.
    """

    def collect_run(store: Store, run: RunMaintenance) -> None:
        layout = RunLayout(run.run)
        inventory = take_inventory(store, layout)
        if inventory.may_be_collected and not run.replica:
            _collect(store, config, run, dry_run=done.dry_run)
            inventory = take_inventory(store, layout)
        elif not done.dry_run and not run.replica:
            store.abort_uploads(layout.folder, config.retention.grace)
        run.kept, run.kept_bytes = len(inventory.commits), inventory.size

    return _each(config, done, collect_run)


def check_maintained(done: Maintenance) -> None:
    """Raise `MaintenanceError`, which names them, where something went wrong with runs."""
    if not done.problems:
        return
    first = done.problems[0]
    others = len(done.problems) - 1
    more = f", and {others} more" if others else ""
    raise MaintenanceError(
        f"of {len(done.runs)} runs in {done.store}, {len(done.problems)} could not be maintained: "
        f"{first.run!r}: {first.problem}{more}"
    )


def maintenance_rows(runs: Sequence[RunMaintenance]) -> list[Row]:
    """Runs as lines of a table."""
    return [
        {
            "run": run.run,
            "registered": run.registered,
            "corrected": run.corrected,
            "expired": run.expired,
            "collected": run.collected,
            "freed": readable_size(run.freed),
            "kept": run.kept,
            "size": readable_size(run.kept_bytes),
            "problem": run.problem,
        }
        for run in runs
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _identified(store: Store, name: str) -> RunMaintenance:
    run = RunMaintenance(run=name)
    try:
        run.replica = bool(read_run(store, RunLayout(name)).replica)
    except CkptTasksError as error:
        run.problem = str(error)
    return run


def _reconciled(report: ReconcileReport) -> RunMaintenance:
    registered = sum(change.kind == "register" for change in report.changes)
    return RunMaintenance(
        run=report.run,
        registered=registered,
        corrected=len(report.changes) - registered,
        problem=report.problem,
    )


def _each(
    config: CheckpointConfig,
    done: Maintenance,
    step: Callable[[Store, RunMaintenance], None],
) -> Maintenance:
    """Do a step for every run of which nothing went wrong yet."""
    runs = [msgspec.structs.replace(run) for run in done.runs]
    patience = Patience()
    with closing(open_existing_store(config.store, for_writing=not done.dry_run)) as store:
        for run in runs:
            if run.problem is None and patience.is_over:
                run.problem = str(patience)
            elif run.problem is None:
                patience.begin()
                away = _guarded(store, run, step)
                patience.end(failed=away)
    return msgspec.structs.replace(done, runs=runs)


def _guarded(
    store: Store, run: RunMaintenance, step: Callable[[Store, RunMaintenance], None]
) -> bool:
    """What goes wrong stands in the run's line. Whether storage or registry did not answer."""
    try:
        step(store, run)
    except CkptTasksError as error:
        run.problem = str(error)
        return isinstance(error, StoreError | RegistryError)
    return False


def _expire(
    store: Store,
    config: CheckpointConfig,
    run: RunMaintenance,
    inventory: Inventory,
    *,
    dry_run: bool,
) -> None:
    view = view_run(store, run.run)
    with attached_registry(config.registry, store, view) as registry:
        if dry_run:
            planned = plan_run(store, run.run, config.retention, registry=registry)
        else:
            planned = expire(store, run.run, config.retention, by=_who(), registry=registry)
    run.expired = len(planned.to_expire)
    given_up = set(map(str, inventory.marks["expired"]))
    damage = [text for attempt in view.attempts for text in attempt.damage]
    damage += [
        f"{one.id}: {one.why}"
        for one in view.checkpoints
        if one.standing == "damaged" and one.id not in given_up
    ]
    if damage:  # nothing of it goes by itself, so that a person must hear of it
        run.problem = f"what belongs to it cannot be told for sure: {damage[0]}"


def _collect(store: Store, config: CheckpointConfig, run: RunMaintenance, *, dry_run: bool) -> None:
    with attached_registry(config.registry, store, view_run(store, run.run)) as registry:
        report = collect(
            store,
            run.run,
            grace=config.retention.grace,
            by=_who(),
            registry=registry,
            dry_run=dry_run,
        )
    run.collected, run.freed = len(report.removed), report.freed
    if report.refused is not None:
        run.problem = f"not collected: {report.refused}"


def _who() -> str:
    return f"ckpt-tasks maintain on {socket.gethostname()}"
