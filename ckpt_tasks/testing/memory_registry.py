"""A registry in memory: what the contract means, in its shortest form."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from ckpt_tasks.errors import RegistryError, RegistryRefusedError
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.registry import (
    AliasHolder,
    Registration,
    Registry,
    RegistryRunIds,
    RunDescription,
    RunState,
    RunStatus,
)
from ckpt_tasks.types import MetricRow, Number

__all__ = ["MemoryRegistry", "MemoryRun", "RegistryMemory"]


class MemoryRun(msgspec.Struct, kw_only=True):
    """A run as the memory holds it. `deleted` runs are kept, but not found."""

    description: RunDescription
    status: RunStatus = "running"
    rows: dict[MetricRow, None] = {}
    note: str = ""
    tags: dict[str, str] = {}
    deleted: bool = False


_Dump = tuple[
    dict[str, MemoryRun], list[Registration], dict[str, str], dict[str, dict[str, Number]]
]


class RegistryMemory:
    """What several `MemoryRegistry` share, as processes share a server.

    Attributes
    ----------
    available
        Set to False, and every call of every registry raises `RegistryError`.
    runs, versions, aliases
        Runs by id, registered checkpoints in order, versions by alias.
    metrics
        Of the checkpoints, by version.
    """

    def __init__(self) -> None:
        self.available = True
        self.runs: dict[str, MemoryRun] = {}
        self.versions: list[Registration] = []
        self.aliases: dict[str, str] = {}
        self.metrics: dict[str, dict[str, Number]] = {}
        self._numbers = itertools.count(1)

    def dump(self) -> bytes:
        """All that it holds, for `load`."""
        return msgspec.msgpack.encode((self.runs, self.versions, self.aliases, self.metrics))

    def load(self, data: bytes) -> None:
        """Hold what another memory held, and nothing else."""
        held = msgspec.msgpack.decode(data, type=_Dump)
        self.runs, self.versions, self.aliases, self.metrics = held
        for run in self.runs.values():
            run.rows = dict.fromkeys(map(_with_one_nan, run.rows))
        self._numbers = itertools.count(len(self.runs) + 1)

    def new_run(self, description: RunDescription) -> str:
        """Add a run, even if there is one of the same uid."""
        run_id = f"run-{next(self._numbers)}"
        self.runs[run_id] = MemoryRun(description=description)
        return run_id

    def runs_of(self, uid: str) -> list[str]:
        """Ids of the runs of a uid that are not deleted, oldest first."""
        return [
            run_id
            for run_id, run in self.runs.items()
            if run.description.uid == uid and not run.deleted
        ]


class MemoryRegistry(Registry):
    """The reference implementation of `Registry`, for tests of what drives a registry.

    Parameters
    ----------
    memory
        Shared by registries that stand for several processes.
    """

    name: ClassVar[str] = "memory"

    def __init__(self, memory: RegistryMemory) -> None:
        self._memory = memory
        self._run_id: str | None = None

    def find_run(self, description: RunDescription) -> RegistryRunIds | None:
        runs = self._reach().runs_of(description.uid)
        return self._ids(runs[0]) if runs else None

    def create_run(self, description: RunDescription) -> RegistryRunIds:
        return self.find_run(description) or self._ids(self._reach().new_run(description))

    def discard_run(self, ids: RegistryRunIds) -> None:
        memory = self._reach()
        run = memory.runs.get(ids.run_id)
        if run is not None and len(memory.runs_of(run.description.uid)) > 1:
            run.deleted = True

    def unused_twins(self, ids: RegistryRunIds) -> list[RegistryRunIds]:
        memory = self._reach()
        used = {one.run_id for one in memory.versions} | {ids.run_id}
        same = memory.runs_of(memory.runs[ids.run_id].description.uid)
        return [self._ids(one) for one in same if one not in used and not memory.runs[one].rows]

    def run_state(self, ids: RegistryRunIds) -> RunState | None:
        run = self._reach().runs.get(ids.run_id)
        return None if run is None else "deleted" if run.deleted else run.status

    def restore_run(self, ids: RegistryRunIds) -> None:
        self._reach().runs[ids.run_id].deleted = False

    def open_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        self.attach_run(ids, description)
        run = self._run()
        run.description = description
        run.status = "running"

    def attach_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        run = self._reach().runs.get(ids.run_id)
        if run is None or run.deleted:
            raise RegistryError(f"run {ids.run_id} of {description.run!r} was deleted")
        self._run_id = ids.run_id

    def high_water(self) -> dict[str, int]:
        steps: dict[str, int] = {}
        for row in self._run().rows:
            steps[row.key] = max(row.step, steps.get(row.key, row.step))
        return steps

    def history(self, key: str, after_step: int, last_step: int | None = None) -> list[MetricRow]:
        return [
            row
            for row in self._run().rows
            if row.key == key
            and row.step > after_step
            and (last_step is None or row.step <= last_step)
        ]

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        self._run().rows.update(dict.fromkeys(map(_with_one_nan, rows)))

    def registered(self) -> dict[str, Registration]:
        self._run()
        versions = self._memory.versions
        return {one.checkpoint: one for one in versions if one.run_id == self._run_id}

    def traces(self) -> dict[str, int]:
        return dict.fromkeys(self.registered(), 0)

    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        found = self.registered().get(record.id)
        if found is None:
            version = str(len(self._memory.metrics) + 1)
            found = Registration(
                checkpoint=record.id,
                model_id=f"model-{version}",
                registered_model="checkpoints",
                version=version,
                run_id=str(self._run_id),
            )
            self._memory.versions.append(found)
            self._memory.metrics[version] = dict(record.metrics)
        return found

    def set_alias(self, alias: str, registration: Registration) -> None:
        if registration not in self._reach().versions:
            raise RegistryRefusedError(f"version {registration.version} was deleted")
        self._memory.aliases[_alias(alias)] = registration.version

    def alias_holder(self, alias: str, metric: str) -> AliasHolder | None:
        version = self._reach().aliases.get(_alias(alias))
        held = [one for one in self._memory.versions if one.version == version]
        if not held:
            return None
        value = self._memory.metrics[held[0].version].get(metric)
        return AliasHolder(
            run_id=held[0].run_id,
            checkpoint=held[0].checkpoint,
            value=None if value is None else float(value),
        )

    def held(self) -> dict[str, list[str]]:
        held: dict[str, list[str]] = {}
        for checkpoint, registration in self.registered().items():
            for alias, version in self._memory.aliases.items():
                if version == registration.version:
                    held.setdefault(checkpoint, []).append(f"alias {alias!r}")
        return held

    def forget(self, checkpoint: str, *, aliases: bool = False) -> None:
        found = self.registered().get(checkpoint)
        if aliases and found is not None:
            held = self._memory.aliases
            self._memory.aliases = {a: v for a, v in held.items() if v != found.version}
        reasons = self.held().get(checkpoint)
        if reasons:
            raise RegistryRefusedError(f"{checkpoint} is in use: {', '.join(reasons)}")
        if found is not None:
            self._memory.versions.remove(found)

    def write_note(self, text: str) -> None:
        self._run().note = text

    def write_tag(self, name: str, text: str) -> None:
        self._run().tags[name] = text

    def end_run(self, status: RunStatus) -> None:
        self._run().status = status

    def links(self, registration: Registration | None) -> dict[str, str]:
        links = {"run": f"memory://runs/{self._run_id}"}
        if registration is not None:
            links["model"] = f"memory://models/{registration.model_id}"
            links["version"] = f"memory://versions/{registration.version}"
        return links

    def _ids(self, run_id: str) -> RegistryRunIds:
        return RegistryRunIds(
            tracking_uri="memory://",
            experiment_id="1",
            experiment="memory",
            run_id=run_id,
            registered_model="checkpoints",
        )

    def _reach(self) -> RegistryMemory:
        if not self._memory.available:
            raise RegistryError("the registry in memory is switched off")
        return self._memory

    def _run(self) -> MemoryRun:
        memory = self._reach()
        if self._run_id is None:
            raise RegistryError("no run is open; call open_run first")
        return memory.runs[self._run_id]


def _alias(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _with_one_nan(row: MetricRow) -> MetricRow:
    """The row, equal to any other with the same values: a NaN equals itself only."""
    return msgspec.structs.replace(row, value=math.nan) if math.isnan(row.value) else row
