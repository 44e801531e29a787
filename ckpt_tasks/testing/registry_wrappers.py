"""Registries around a registry: one that passes on, one that fails as told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ckpt_tasks.errors import RegistryError
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
from ckpt_tasks.testing.faults import Fault, FaultInjector
from ckpt_tasks.types import MetricRow

__all__ = [
    "REGISTRY_CHANGES",
    "REGISTRY_OPERATIONS",
    "FaultyRegistry",
    "WrapperRegistry",
]

REGISTRY_CHANGES = frozenset({
    "create_run", "discard_run", "restore_run", "open_run", "log_metrics", "register", "set_alias",
    "forget", "write_note", "write_tag", "end_run",
})  # fmt: skip
"""Operations that change the registry."""

REGISTRY_OPERATIONS = REGISTRY_CHANGES | {
    "find_run", "unused_twins", "run_state", "attach_run", "high_water", "history", "registered",
    "traces", "alias_holder", "held",
}  # fmt: skip
"""Operations that ask or change it; `Registry.links` does neither."""

T = TypeVar("T")


class WrapperRegistry(Registry):
    """Passes every operation on to `registry`. Subclasses override `_run`, or single methods.

    Parameters
    ----------
    registry
        The registry that does the work.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        vars(self)["name"] = registry.name  # its class has none: it stands for that one

    def _run(self, operation: str, subject: str, call: Callable[[], T]) -> T:
        """Every operation passes here; `call` does it. `subject` says with what, for people."""
        return call()

    def find_run(self, description: RunDescription) -> RegistryRunIds | None:
        return self._run("find_run", description.run, lambda: self.registry.find_run(description))

    def create_run(self, description: RunDescription) -> RegistryRunIds:
        return self._run(
            "create_run", description.run, lambda: self.registry.create_run(description)
        )

    def discard_run(self, ids: RegistryRunIds) -> None:
        self._run("discard_run", ids.run_id, lambda: self.registry.discard_run(ids))

    def unused_twins(self, ids: RegistryRunIds) -> list[RegistryRunIds]:
        return self._run("unused_twins", ids.run_id, lambda: self.registry.unused_twins(ids))

    def run_state(self, ids: RegistryRunIds) -> RunState | None:
        return self._run("run_state", ids.run_id, lambda: self.registry.run_state(ids))

    def restore_run(self, ids: RegistryRunIds) -> None:
        self._run("restore_run", ids.run_id, lambda: self.registry.restore_run(ids))

    def open_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        self._run("open_run", ids.run_id, lambda: self.registry.open_run(ids, description))

    def attach_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        self._run("attach_run", ids.run_id, lambda: self.registry.attach_run(ids, description))

    def high_water(self) -> dict[str, int]:
        return self._run("high_water", "", self.registry.high_water)

    def history(self, key: str, after_step: int, last_step: int | None = None) -> list[MetricRow]:
        return self._run("history", key, lambda: self.registry.history(key, after_step, last_step))

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        rows = list(rows)
        self._run("log_metrics", f"{len(rows)} rows", lambda: self.registry.log_metrics(rows))

    def registered(self) -> dict[str, Registration]:
        return self._run("registered", "", self.registry.registered)

    def traces(self) -> dict[str, int]:
        return self._run("traces", "", self.registry.traces)

    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        return self._run(
            "register",
            record.id,
            lambda: self.registry.register(record, uri=uri, manifest=manifest),
        )

    def set_alias(self, alias: str, registration: Registration) -> None:
        self._run(
            "set_alias",
            f"{alias} to {registration.checkpoint}",
            lambda: self.registry.set_alias(alias, registration),
        )

    def alias_holder(self, alias: str, metric: str) -> AliasHolder | None:
        return self._run("alias_holder", alias, lambda: self.registry.alias_holder(alias, metric))

    def held(self) -> dict[str, list[str]]:
        return self._run("held", "", self.registry.held)

    def forget(self, checkpoint: str, *, aliases: bool = False) -> None:
        self._run("forget", checkpoint, lambda: self.registry.forget(checkpoint, aliases=aliases))

    def write_note(self, text: str) -> None:
        self._run("write_note", "", lambda: self.registry.write_note(text))

    def write_tag(self, name: str, text: str) -> None:
        self._run("write_tag", name, lambda: self.registry.write_tag(name, text))

    def end_run(self, status: RunStatus) -> None:
        self._run("end_run", status, lambda: self.registry.end_run(status))

    def links(self, registration: Registration | None) -> dict[str, str]:
        return self.registry.links(registration)

    def close(self) -> None:
        self.registry.close()


class FaultyRegistry(WrapperRegistry):
    """Fails, or kills or stalls the process, at chosen operations, and counts them.

    Parameters
    ----------
    registry
        The registry that does the work.
    faults
        What goes wrong; none, to count only. Or what counts the operations of other things, too.
    """

    def __init__(self, registry: Registry, faults: Iterable[Fault] | FaultInjector = ()) -> None:
        super().__init__(registry)
        if not isinstance(faults, FaultInjector):
            faults = FaultInjector(faults, counted=REGISTRY_OPERATIONS)
        self.injector = faults

    @property
    def log(self) -> list[tuple[str, str]]:
        """(operation, subject) of each operation that was asked for, in order."""
        return self.injector.log

    def _run(self, operation: str, subject: str, call: Callable[[], T]) -> T:
        return self.injector.run(operation, subject, call, error=RegistryError)
