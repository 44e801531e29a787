"""In what store and registry disagree about a run. Looks, and changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, is_complete, list_checkpoints
from ckpt_tasks.checkpointer.marks import read_completed
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RegistryRunIds
from ckpt_tasks.masking import mask_url
from ckpt_tasks.registry import (
    Registration,
    Registry,
    RunDescription,
    RunState,
    RunStatus,
)
from ckpt_tasks.registry.best import BEST, BestAlias
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.registration.backlog import Backlog, find_backlog
from ckpt_tasks.training.registration.promotions import find_lost
from ckpt_tasks.training.registration.publisher import resume_alias
from ckpt_tasks.training.registration.registry_ids import read_ids

__all__ = [
    "Difference",
    "Differences",
    "Kind",
    "describe",
    "find_differences",
    "trained",
    "wanted_status",
]

Kind = Literal[
    "run", "twin", "gone", "register", "metrics", "alias", "double", "status", "expired", "orphan"
]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that store and registry disagree about, or that nothing needs any more.

    Parameters
    ----------
    kind
        ``run``: the registry has no such run. ``twin``: a second, empty one, of a lost race.
        ``gone``: registered, and no longer in the store. ``register``: committed, and not
        registered. ``metrics``: rows that the registry lacks. ``alias``: points elsewhere.
        ``double``: registered twice. ``status``: of a run that nobody trains any more.
        ``expired``, ``orphan``: bytes whose grace is over, of a checkpoint and of none.
    what
        The checkpoint, run, alias or folder.
    why
        What was found.
    action
        What is done about it.
    """

    kind: Kind
    what: str
    why: str
    action: str


class Differences(msgspec.Struct, kw_only=True):
    """What a comparison found.

    Parameters
    ----------
    ids
        Of the run in the registry, as the store or a search tells; ``None`` where there is none.
    state
        How that run stands.
    found
        Each difference, in the order in which they are removed.
    """

    ids: RegistryRunIds | None
    state: RunState | None
    twins: list[RegistryRunIds] = []
    gone: list[str] = []
    doubles: list[str] = []
    found: list[Difference] = []


def find_differences(
    store: Store,
    view: RunView,
    registry: Registry,
    config: RegistryConfig,
    tails_after: float | None = None,
) -> Differences:
    """Compare a run that has trained with what the registry has of it.

    The registry is asked first: what it had registered by then was committed before, so that a
    checkpoint which the store does not list afterwards is gone. `tails_after` as `find_backlog`.

    Raises
    ------
    RegistryError
        The registry did not answer.
    StoreError
        Storage did not answer.
    """
    layout = RunLayout(view.run.run)
    description = describe(store, view, trained(view)[-1])
    kept = read_ids(store, layout, registry.name, lambda _: None)
    ids, state = kept, registry.run_state(kept) if kept is not None else None
    if state is None:
        ids = registry.find_run(description)
        state = registry.run_state(ids) if ids is not None else None
    differences = Differences(ids=ids, state=state)
    if ids is None or ids != kept or state == "deleted":
        differences.found.append(_run_difference(registry, kept, ids, state))
    if ids is None or state in (None, "deleted"):
        # Of what was deleted nothing can be asked; it is compared once it is back.
        backlog = _backlog(store, layout, view, {}, {}, tails_after)
        _compare_backlog(differences, backlog if state is None else None)
        if state is None:
            _compare_promotions(differences, store, layout, registry, backlog, None)
        return differences
    registry.attach_run(ids, description)
    _compare_entries(differences, store, layout, registry)
    registered = registry.registered()
    backlog = _backlog(store, layout, view, registered, registry.high_water(), tails_after)
    _compare_backlog(differences, backlog)
    _compare_promotions(differences, store, layout, registry, backlog, registered)
    _compare_aliases(differences, layout, registry, config, backlog, registered)
    _compare_status(differences, store, view)
    return differences


def trained(view: RunView) -> list[AttemptView]:
    """The attempts that came to training; the registry hears of no others."""
    return [attempt for attempt in view.attempts if attempt.resumed is not None]


def describe(store: Store, view: RunView, attempt: AttemptView) -> RunDescription:
    """The run as its attempt tells the registry of it."""
    claim = attempt.claim
    return RunDescription(
        run=view.run.run,
        uid=view.run.uid,
        store_url=store.url,
        hyperparameters=claim.hyperparameters if claim is not None else {},
        entrypoint=claim.entrypoint if claim is not None else None,
        tags=claim.tags if claim is not None else {},
    )


def wanted_status(store: Store, view: RunView, state: RunState | None) -> RunStatus:
    """How a run that nobody trains is to stand in the registry."""
    if view.completed is not None:
        return "finished"
    if state == "failed" or state == "stopped":
        return state
    if state == "finished" and not _has_trained_on(store, view):
        return state
    beat = read_heartbeat(store, RunLayout(view.run.run), view.attempts[-1].number)
    return "failed" if beat is not None and beat.failure is not None else "stopped"


def _has_trained_on(store: Store, view: RunView) -> bool:
    """Whether a run that was complete is not, as a later attempt has trained since."""
    try:
        marker = read_completed(store, RunLayout(view.run.run))
    except CorruptCheckpointError:
        return False  # the registry may be all that still knows that it ended
    return marker is not None and not is_complete(marker, view.attempts)


def _backlog(
    store: Store,
    layout: RunLayout,
    view: RunView,
    registered: dict[str, Registration],
    high_water: dict[str, int],
    tails_after: float | None,
) -> Backlog:
    return find_backlog(
        store,
        layout,
        run=view.run,
        registered=registered,
        high_water=high_water,
        tails_after=tails_after,
    )


def _run_difference(
    registry: Registry,
    kept: RegistryRunIds | None,
    ids: RegistryRunIds | None,
    state: RunState | None,
) -> Difference:
    name = registry.name
    if kept is None:
        why = f"the store names no run of {name}"
    else:
        why = f"{name} has no run {kept.run_id}, which was made at {mask_url(kept.tracking_uri)}"
    if state == "deleted":
        why = f"it was deleted in {name}"
        action = "restore it, then compare what it holds"
    elif ids is None:
        action = "make it from what the store has"
    else:
        action = f"name run {ids.run_id}, which has the same uid"
    return Difference(kind="run", what=name, why=why, action=action)


def _compare_entries(
    differences: Differences, store: Store, layout: RunLayout, registry: Registry
) -> None:
    assert differences.ids is not None
    differences.twins = registry.unused_twins(differences.ids)
    traces = registry.traces()
    committed = set(map(str, list_checkpoints(store, layout)))
    differences.gone = sorted(traces.keys() - committed)
    differences.doubles = sorted(c for c in traces.keys() & committed if traces[c])
    for twin in differences.twins:
        why = "an empty run of the same uid, as two that made it at once leave it"
        _add(differences, "twin", twin.run_id, why, "delete it")
    for checkpoint in differences.gone:
        why = "registered, and the store has no commit record of it"
        _add(differences, "gone", checkpoint, why, "delete alias, version, then logged model")
    for checkpoint in differences.doubles:
        why = f"it has {traces[checkpoint]} more than the one registration it needs"
        _add(differences, "double", checkpoint, why, "delete the later ones")


def _compare_backlog(differences: Differences, backlog: Backlog | None) -> None:
    if backlog is None:
        return
    for record in backlog.missing:
        _add(differences, "register", record.id, "committed, and not registered", "register it")
    rows = Counter(row.key for row in backlog.rows)
    for key, count in rows.items():
        why = f"the store keeps {count} rows that the registry lacks"
        _add(differences, "metrics", key, why, "send them")


def _compare_promotions(
    differences: Differences,
    store: Store,
    layout: RunLayout,
    registry: Registry,
    backlog: Backlog,
    registered: dict[str, Registration] | None,
) -> None:
    """`registered` is ``None`` where the registry has no such run, and cannot be asked."""
    models = {one: held.model_id for one, held in (registered or {}).items()}
    missing = {record.id: None for record in backlog.missing}
    for checkpoint, lost in find_lost(store, layout, registry.name, {**models, **missing}).items():
        for alias in (promotion.alias for promotion in lost):
            if registered is None or registry.alias_holder(alias, "step") is None:
                why = "it was promoted, and that registration is gone"
                _add(differences, "alias", alias, why, f"point it at {checkpoint}")


def _compare_aliases(
    differences: Differences,
    layout: RunLayout,
    registry: Registry,
    config: RegistryConfig,
    backlog: Backlog,
    registered: dict[str, Registration],
) -> None:
    ids = differences.ids
    assert ids is not None
    newest = _newest(backlog)
    if newest is not None:
        alias = resume_alias(layout.run)
        held = registry.alias_holder(alias, "step")
        if held is None or (held.run_id, held.checkpoint) != (ids.run_id, newest.id):
            _point(differences, alias, held.checkpoint if held else None, newest.id)
    best = BestAlias(registry, config, run_id=ids.run_id, attempt=0)
    best.exclude(backlog.damaged)
    for record in backlog.registered:
        best.consider(record)
    due = best.due()
    if due is not None and due.checkpoint in registered:
        _point(differences, BEST, None, due.checkpoint)


def _newest(backlog: Backlog) -> CommitRecord | None:
    """The newest that a retry may go on from, once what is missing is registered."""
    healthy = [r for r in (*backlog.registered, *backlog.missing) if not r.nonfinite]
    return max(healthy, key=lambda r: (r.checkpoint.attempt, r.checkpoint.sequence), default=None)


def _point(differences: Differences, alias: str, now: str | None, to: str) -> None:
    why = f"it points at {now}" if now is not None else "it does not point where it should"
    _add(differences, "alias", alias, why, f"point it at {to}")


def _compare_status(differences: Differences, store: Store, view: RunView) -> None:
    wanted = wanted_status(store, view, differences.state)
    if differences.state == wanted:
        return
    ended = "it is complete" if view.completed is not None else "its last attempt is dead"
    why = f"it is shown as {differences.state}, and {ended}"
    assert differences.ids is not None
    _add(differences, "status", differences.ids.run_id, why, f"mark it as {wanted}")


def _add(differences: Differences, kind: Kind, what: str, why: str, action: str) -> None:
    differences.found.append(Difference(kind=kind, what=what, why=why, action=action))
