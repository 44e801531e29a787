"""Where a flow's configuration comes from: its author's arguments, the environment, a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    SaveConfig,
    ScheduleConfig,
    StoreConfig,
    load_config,
)
from ckpt_tasks.integrations.prefect.blocks import CheckpointStore, ModelRegistry

__all__ = ["Settings"]

_GRACE = 20.0
"""Prefect ends a cancelled flow run's process by force after 30 seconds."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the author of a flow gave; ``None`` leaves it to the environment, or to a file.

    Raises `ConfigError` when made with a store that cannot be one, or with less than one rank.
    """

    store: str | StoreConfig | CheckpointStore | None = None
    registry: RegistryConfig | ModelRegistry | None = None
    schedule: ScheduleConfig | None = None
    save: SaveConfig | None = None
    retention: RetentionConfig | None = None
    attempt: AttemptConfig | None = None
    nproc: int | None = None

    def __post_init__(self) -> None:
        self._store(StoreConfig())
        self._attempt(AttemptConfig())

    def resolve(self) -> CheckpointConfig:
        """The configuration, with what the settings leave open as this process finds it.

        Raises
        ------
        ConfigError
            The environment's or the file's configuration is wrong.
        """
        found = load_config()
        return replace(
            found,
            store=self._store(found.store),
            registry=self._registry(found.registry),
            schedule=self.schedule or _or_each_epoch(found.schedule),
            save=self.save or found.save,
            retention=self.retention or found.retention,
            attempt=self._attempt(found.attempt),
        )

    def credentials(self) -> dict[str, Any]:
        """Environment variables that the blocks hold."""
        found: dict[str, Any] = {}
        for block in (self.store, self.registry):
            if isinstance(block, CheckpointStore | ModelRegistry):
                found.update(block.credentials.get_secret_value())
        return found

    def _store(self, found: StoreConfig) -> StoreConfig:
        if isinstance(self.store, CheckpointStore):
            return self.store.config()
        if isinstance(self.store, str):
            return replace(found, url=self.store)
        return self.store or found

    def _registry(self, found: RegistryConfig) -> RegistryConfig:
        if isinstance(self.registry, ModelRegistry):
            return self.registry.config()
        return self.registry or found

    def _attempt(self, found: AttemptConfig) -> AttemptConfig:
        attempt = self.attempt or _within_prefects_patience(found)
        return attempt if self.nproc is None else replace(attempt, nproc=self.nproc)


def _or_each_epoch(found: ScheduleConfig) -> ScheduleConfig:
    """What was found; where that says nothing, a schedule that bounds what a death costs."""
    return found if found != ScheduleConfig() else ScheduleConfig(every_epochs=1)


def _within_prefects_patience(found: AttemptConfig) -> AttemptConfig:
    """What was found; the general default of the grace is as long as Prefect waits in all."""
    return found if found.grace != AttemptConfig().grace else replace(found, grace=_GRACE)
