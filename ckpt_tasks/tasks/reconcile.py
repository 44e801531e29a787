"""Make store and registry agree after any outage: the store is the truth.

A run whose attempt is alive is left to that attempt's registrar, which finds all the same
differences when it begins. For any other, what is missing is published as its registrar would
have done, in the name of the newest attempt, so that it stops as soon as another one begins.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import (
    CkptTasksError,
    RegistryRefusedError,
    StaleAttemptError,
)
from ckpt_tasks.events import Event, Warned
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import HeartbeatObserver, read_heartbeat
from ckpt_tasks.fencing.process import process_is_alive
from ckpt_tasks.fencing.replica import check_not_replica
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry import Registry, RegistryRunIds, RunDescription, load_registry
from ckpt_tasks.retention import collect
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.tasks.differences import (
    Difference,
    Differences,
    Kind,
    describe,
    find_differences,
    trained,
    wanted_status,
)
from ckpt_tasks.tasks.patience import Patience
from ckpt_tasks.training.registration.publisher import REFUSALS, Publisher, register_checkpoint
from ckpt_tasks.training.registration.registry_ids import choose_ids, read_ids
from ckpt_tasks.types import CheckpointId

__all__ = ["ReconcileReport", "Reconciliation", "Tell", "reconcile", "reconcile_in_turn"]

_MOST_WATCHED = 64

Tell = Callable[[str], None]


class ReconcileReport(msgspec.Struct, kw_only=True):
    """What was found of a run, and what was done about it.

    Parameters
    ----------
    changes
        Differences that were removed, or (of a dry run) would be.
    left
        Those that stay for now.
    notes
        Why, and what else a person may want to know.
    problem
        What went wrong; ``None`` where nothing did.
    """

    run: str
    dry_run: bool
    changes: list[Difference] = []
    left: list[Difference] = []
    notes: list[str] = []
    problem: str | None = None

    def __str__(self) -> str:
        would = "would be made" if self.dry_run else "made"
        told = [f"{len(self.changes)} changes {would}" if self.changes else "nothing to change"]
        if self.left:
            told.append(f"{len(self.left)} differences left")
        if self.problem is not None:
            told.append(f"stopped: {self.problem}")
        return f"run {self.run!r}: {'; '.join(told)}"


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
        The configuration cannot work, or the run is a replica: its original is registered.
    StoreError
        Storage did not answer at first.
    """
    store = open_existing_store(config.store)
    try:
        view = view_run(store, run)
        check_not_replica(store, view.run)
        reconciliation = Reconciliation(store, config, view, dry_run=dry_run)
        return reconcile_in_turn([reconciliation], config, tell, Patience())[0]
    finally:
        store.close()


def reconcile_in_turn(
    runs: Sequence[Reconciliation],
    config: CheckpointConfig,
    tell: Tell | None,
    patience: Patience,
) -> list[ReconcileReport]:
    """Look at all, watch all that may be alive at once, then act on one after the other.

    Once `patience` with the registry is over, it is not asked about the others any more.
    """
    for run in runs:
        if patience.is_over:
            run.report.problem = str(patience)
            continue
        patience.begin()
        run.look()
        patience.end(failed=run.report.problem is not None)
    doubtful = [run for run in runs if run.must_be_watched]
    if doubtful and tell is not None:
        after = config.attempt.takeover_after
        tell(f"watching the heartbeat of {len(doubtful)} attempt(s) for up to {after:g} s")
    if doubtful:
        with ThreadPoolExecutor(min(len(doubtful), _MOST_WATCHED)) as pool:
            list(pool.map(Reconciliation.watch, doubtful))
    for run in runs:
        run.act()
    return [run.report for run in runs]


class Reconciliation:
    """One run's: `look`, then `watch` where `must_be_watched`, then `act`.

    With `collects`, what nothing needs any more is removed as well.
    """

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        view: RunView,
        *,
        dry_run: bool,
        collects: bool = True,
    ) -> None:
        self._store = store
        self._config = config
        self._view = view
        self._collects = collects
        self._layout = RunLayout(view.run.run)
        self._differences: Differences | None = None
        self._lives = False
        self.must_be_watched = False
        self.report = ReconcileReport(run=view.run.run, dry_run=dry_run)

    # -- looking ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Find the differences, and whether it is known that the newest attempt is over."""
        self._tell_stale_attempts()
        if self._config.registry.tracking_uri is None or not trained(self._view):
            return
        registry = load_registry(self._config.registry)
        try:
            self._differences = self._compare(registry)
            if self._differences.found:
                self._look_for_life()
        except CkptTasksError as error:
            self.report.problem = str(error)
        finally:
            registry.close()

    def watch(self) -> None:
        """Wait for the next heartbeat, as who wants to take the run over does."""
        observer = HeartbeatObserver(self._store, self._layout, self._view.attempts[-1].number)
        try:
            self._lives = not observer.is_silent(self._config.attempt.takeover_after)
        except CkptTasksError as error:
            self.report.problem = str(error)

    def _compare(self, registry: Registry) -> Differences:
        return find_differences(
            self._store, self._view, registry, self._config.registry, self._tails_after
        )

    @property
    def _tails_after(self) -> float:
        """A run that is complete does no step again; another may go on until its grace is over."""
        return 0.0 if self._view.completed is not None else self._config.retention.grace

    def _tell_stale_attempts(self) -> None:
        for attempt in self._view.attempts[:-1]:
            if attempt.resumed is None:
                self.report.notes.append(f"attempt {attempt.number} was claimed and never trained")

    def _look_for_life(self) -> None:
        newest = self._view.attempts[-1]
        beat = read_heartbeat(self._store, self._layout, newest.number)
        if beat is not None and beat.ended:
            return
        claim = newest.claim
        # A trainer that has died may have left a registrar with work: only silence tells.
        self._lives = claim is not None and process_is_alive(claim.process) is True
        self.must_be_watched = not self._lives

    # -- acting ----------------------------------------------------------------------------------

    def act(self) -> None:
        """Remove the differences, unless they are the business of an attempt that is alive."""
        if self._differences is not None and self._differences.found:
            found = self._differences.found
            if self._lives:
                number = self._view.attempts[-1].number
                self.report.left += [d for d in found if d.kind != "status"]
                self._tell(f"attempt {number} is alive, and publishes what is missing by itself")
            elif self.report.problem is not None:
                self.report.left += found
            elif self.report.dry_run:
                self.report.changes += found
            else:
                self._remove_differences(self._differences)
        if self._collects and self.report.problem is None:
            self._guarded(self._collect)

    def _guarded(self, step: Callable[[Registry | None], None]) -> None:
        """Do a step with a registry of its own; what goes wrong is reported."""
        config = self._config.registry
        registry = load_registry(config) if config.tracking_uri is not None else None
        try:
            step(registry)
        except StaleAttemptError:
            self.report.notes.append("a new attempt has begun, and publishes what is missing")
        except CkptTasksError as error:
            self.report.problem = self.report.problem or str(error)
        finally:
            if registry is not None:
                registry.close()

    def _remove_differences(self, before: Differences) -> None:
        self._guarded(lambda registry: self._publish(registry, before))
        self._guarded(lambda registry: self._tell_apart(registry, before))

    def _tell_apart(self, registry: Registry | None, before: Differences) -> None:
        """What is found no more has been removed; what is, is left."""
        assert registry is not None
        after = self._compare(registry)
        self._differences = after
        still = {(difference.kind, difference.what) for difference in after.found}
        self.report.changes += [d for d in before.found if (d.kind, d.what) not in still]
        self.report.left += after.found

    def _publish(self, registry: Registry | None, before: Differences) -> None:
        assert registry is not None
        view, store, layout = self._view, self._store, self._layout
        fence = Fence(store, layout, view.attempts[-1].number)
        fence.check()
        self._bring_back(registry, before, fence)
        for twin in before.twins:
            registry.discard_run(twin)
        for checkpoint in before.gone:
            if not store.exists(layout.commit(CheckpointId.parse(checkpoint))):
                self._forget(registry, checkpoint)
        publisher = Publisher(
            store,
            layout,
            fence,
            registry,
            self._config.registry,
            describe(store, view, trained(view)[-1]),
            self._note,
            tails_after=self._tails_after,
        )
        _publish_all(publisher)
        for checkpoint in before.doubles:
            parsed = CheckpointId.parse(checkpoint)
            register_checkpoint(store, layout, registry, parsed, run=view.run, fence=fence)
        publisher.end(wanted_status(store, view, before.state))

    def _bring_back(self, registry: Registry, before: Differences, fence: Fence) -> None:
        """Bind the registry to the run, which is restored, or made anew, where it is not there."""
        store, layout, view = self._store, self._layout, self._view
        attempts = [describe(store, view, attempt) for attempt in trained(view)]
        if before.ids is None:
            ids = self._make_run(registry, attempts[0], fence)
            for description in attempts:  # values that changed are shown in their order
                registry.open_run(ids, description)
            for checkpoint in registry.traces():  # left of a run that is gone
                self._forget(registry, checkpoint)
            return
        if before.state == "deleted":
            registry.restore_run(before.ids)
            found = self._compare(registry)
            before.found += found.found
            before.twins, before.gone, before.doubles = found.twins, found.gone, found.doubles
        store.put(layout.registry_ids(registry.name), encode(before.ids))
        registry.attach_run(before.ids, attempts[-1])

    def _make_run(
        self, registry: Registry, description: RunDescription, fence: Fence
    ) -> RegistryRunIds:
        store, layout = self._store, self._layout
        if read_ids(store, layout, registry.name, self._tell) is None:
            return choose_ids(store, layout, registry, description, fence, self._tell)
        ids = registry.create_run(description)
        store.put(layout.registry_ids(registry.name), encode(ids))  # of a run that is gone
        return ids

    def _forget(self, registry: Registry, checkpoint: str) -> None:
        try:
            registry.forget(checkpoint, aliases=True)
        except RegistryRefusedError as error:
            self._tell(str(error))

    def _tell(self, note: str) -> None:
        self.report.notes.append(note)

    def _note(self, event: Event) -> None:
        if isinstance(event, Warned):
            self._tell(event.message)

    # -- collecting ------------------------------------------------------------------------------

    def _collect(self, registry: Registry | None) -> None:
        """Remove what has expired or was never committed, after the grace."""
        grace = self._config.retention.grace
        compared = self._differences
        if compared is not None and compared.state in (None, "deleted"):
            self._tell("what is to be collected can be told once the registry has the run")
            return
        bound = self._bound(registry)
        by = f"ckpt-tasks on {socket.gethostname()}"
        run = self._view.run.run
        plan = collect(self._store, run, grace=grace, by=by, registry=bound, dry_run=True)
        why = f"nothing needs it any more, and the grace of {grace:g} s is over"
        found = [
            *(_removal("expired", checkpoint, why) for checkpoint in plan.removed),
            *(_removal("orphan", folder, why) for folder in plan.leftovers),
        ]
        self._remove_uploads(grace)
        if self.report.dry_run:
            self.report.changes += found
        elif found:
            done = collect(self._store, run, grace=grace, by=by, registry=bound)
            removed = {*done.removed, *done.leftovers}
            self.report.changes += [d for d in found if d.what in removed]
            self.report.left += [d for d in found if d.what not in removed]
            plan = done
            self._tell(f"{readable_size(done.freed)} removed")
        if plan.refused is not None:
            self._tell(f"not collected: {plan.refused}")

    def _remove_uploads(self, grace: float) -> None:
        store, folder = self._store, self._layout.folder
        remove = store.list_uploads if self.report.dry_run else store.abort_uploads
        why = f"begun longer ago than {grace:g} s, and never completed"
        uploads = remove(folder, grace)
        self.report.changes += [_removal("orphan", upload.path, why) for upload in uploads]

    def _bound(self, registry: Registry | None) -> Registry | None:
        """The registry, bound to the run; ``None`` where it has none, now that all agrees."""
        found = self._differences
        if registry is None or found is None or found.ids is None:
            return None
        registry.attach_run(found.ids, describe(self._store, self._view, trained(self._view)[-1]))
        return registry


def _removal(kind: Kind, what: str, why: str) -> Difference:
    return Difference(kind=kind, what=what, why=why, action="remove its bytes")


def _publish_all(publisher: Publisher) -> None:
    """A checkpoint that is refused again and again is set aside, and told."""
    for _ in range(REFUSALS - 1):
        try:
            publisher.publish()
        except RegistryRefusedError:
            continue
        return
    publisher.publish()
