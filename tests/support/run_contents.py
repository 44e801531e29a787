"""Everything that is left of a run, in store and registry, once nobody works on it any more."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterable
from pathlib import Path

import msgspec
from support.aged_store import AgedStore
from support.faulty_attempt import open_registry
from support.retained_runs import GRACE
from support.run_checks import check_run, leftovers_of, temporary_files

from ckpt_tasks.checkpointer.catalog import list_checkpoints, view_run
from ckpt_tasks.checkpointer.reader import read_commit, read_index
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.lineage import trace_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Index
from ckpt_tasks.registry import Registry
from ckpt_tasks.registry.best import BEST
from ckpt_tasks.retention import collect, expire
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.tasks.registered import attach
from ckpt_tasks.training.registration.publisher import resume_alias
from ckpt_tasks.training.registration.registry_ids import read_ids
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import CheckpointId


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has come to, and what is wrong with it.

    Parameters
    ----------
    final_state
        Digest of what the training had in memory at its end.
    saved_state
        Digest of the newest checkpoint's state.
    kept, registered
        Steps of checkpoints, of the lineage and in the registry.
    aliases
        The step that each points at.
    losses
        Of each step, as the registry has them.
    """

    final_state: str
    saved_state: str
    kept: list[int]
    registered: list[int]
    aliases: dict[str, int | None]
    losses: list[tuple[int, float]]
    status: str | None
    problems: list[str]

    def differences(self, expected: Contents, *, may_miss_saves: bool) -> list[str]:
        """From the run that nothing ever happened to; saves may be missing, but not the last."""
        fewer = {*self.kept} <= {*expected.kept} and self.kept[-1:] == expected.kept[-1:]
        if may_miss_saves and fewer:
            losses = dict(expected.losses)
            best = min(self.kept, key=lambda step: losses[step])
            expected = msgspec.structs.replace(
                expected,
                kept=self.kept,
                registered=self.kept,
                aliases={**expected.aliases, BEST: best},
            )
        return [
            f"{name} is {getattr(self, name)!r}, and not {getattr(expected, name)!r}"
            for name in self.__struct_fields__
            if name != "problems" and getattr(self, name) != getattr(expected, name)
        ]


def contents_of(spec: TrainSpec, *, digest: str, steps: int, stalled: bool = False) -> Contents:
    """Retain by the run's rules, with every grace passed, and look at all that is left.

    Parameters
    ----------
    digest
        Of what the training had in memory at its end.
    stalled
        See `check_run`.
    """
    problems = _problems_of_lineage(spec, steps, stalled)
    store = AgedStore(open_store(spec.config.store))
    registry = open_registry(spec.config.registry)
    try:
        return _contents(spec, store, registry, digest, problems)
    finally:
        registry.close()
        store.close()


def _contents(
    spec: TrainSpec, store: AgedStore, registry: Registry, digest: str, problems: list[str]
) -> Contents:
    layout = RunLayout(spec.run)
    assert attach(store, registry, view_run(store, spec.run), None), "no run in the registry"
    expire(store, spec.run, spec.config.retention, by="a test", registry=registry)
    store.age(2 * GRACE)
    report = collect(store, spec.run, grace=GRACE, by="a test", registry=registry)
    if report.refused is not None:
        problems.append(f"nothing is collected: {report.refused}")
    problems += _left_without_need(store, layout)
    lineage = trace_lineage(read_attempts(store, layout))
    kept = lineage.valid(list_checkpoints(store, layout))[::-1]
    registered = sorted(map(CheckpointId.parse, registry.registered()))
    problems += [f"{c} is registered, and not in the store" for c in {*registered} - {*kept}]
    return Contents(
        final_state=digest,
        saved_state=_state_of(store, layout, kept[-1]),
        kept=[c.step for c in kept],
        registered=[c.step for c in registered],
        aliases={alias: _holder(registry, alias) for alias in (BEST, resume_alias(spec.run))},
        losses=sorted((row.step, row.value) for row in registry.history("loss", 0)),
        status=_status(store, layout, registry),
        problems=problems,
    )


def _problems_of_lineage(spec: TrainSpec, steps: int, stalled: bool) -> list[str]:
    retained = not spec.config.retention.keeps_everything
    try:
        check_run(spec, steps=steps, retained=retained, may_come_late=stalled)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"the run is not whole: {error} ({where.line})"]
    return []


def _left_without_need(store: Store, layout: RunLayout) -> list[str]:
    left = leftovers_of(store, layout)
    inner = store.store if isinstance(store, AgedStore) else store
    if isinstance(inner, LocalStore):
        left |= {str(path) for path in temporary_files(Path(inner.root))}
    standing = set(list_checkpoints(store, layout))
    for info in store.list_objects(layout.all_marks):
        checkpoint = layout.checkpoint_id(info.path)
        if checkpoint is not None and checkpoint not in standing:
            left.add(info.path)
    return [f"{path} is kept, and nobody refers to it" for path in sorted(left)]


def _holder(registry: Registry, alias: str) -> int | None:
    held = registry.alias_holder(alias, "loss")
    return CheckpointId.parse(held.checkpoint).step if held and held.checkpoint else None


def _status(store: Store, layout: RunLayout, registry: Registry) -> str | None:
    ids = read_ids(store, layout, registry.name, lambda _: None)
    return registry.run_state(ids) if ids is not None else None


def _state_of(store: Store, layout: RunLayout, checkpoint: CheckpointId) -> str:
    """Of every tensor and every value, wherever they lie."""
    record = read_commit(store, layout, checkpoint)
    indexes = [read_index(store, layout, ref) for ref in record.indexes]
    return hashlib.sha256(b"".join(part for i in indexes for part in _parts(i))).hexdigest()


def _parts(index: Index) -> Iterable[bytes]:
    yield msgspec.json.encode(index.items, order="deterministic")
    for tensor in index.tensors:
        yield msgspec.json.encode([tensor.key, tensor.dtype, tensor.shape, tensor.chunks])
