"""Where an operator's configuration comes from: its arguments, connections, the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

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
from ckpt_tasks.integrations.airflow.connections import (
    Credentials,
    split_connection,
    storage_credentials,
)
from ckpt_tasks.integrations.airflow.hooks import CheckpointHook, MlflowHook

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator was given; ``None`` leaves it to the connection or the environment.

    Raises `ConfigError` when made with less than one rank.
    """

    store: str | None = None
    ckpt_conn_id: str | None = None
    mlflow_conn_id: str | None = None
    registry: RegistryConfig | None = None
    schedule: ScheduleConfig | None = None
    save: SaveConfig | None = None
    retention: RetentionConfig | None = None
    attempt: AttemptConfig | None = None
    nproc: int | None = None

    def __post_init__(self) -> None:
        self._attempt(AttemptConfig())

    def resolve(self, base: CheckpointConfig | None = None) -> tuple[CheckpointConfig, Credentials]:
        """The configuration, and the credentials that whoever works with it needs.

        Parameters
        ----------
        base
            What the settings leave open; default: the environment's configuration.

        Raises
        ------
        ConfigError
            A connection is missing or cannot work, or the environment's configuration is wrong.
        """
        config = base or load_config()
        store, for_store = self._store(config.store)
        registry, for_registry = self._registry(config.registry)
        config = replace(
            config,
            store=store,
            registry=registry,
            schedule=self.schedule or _or_each_epoch(config.schedule),
            save=self.save or config.save,
            retention=self.retention or config.retention,
            attempt=self._attempt(config.attempt),
        )
        return config, for_store | for_registry

    @contextmanager
    def applied(self) -> Iterator[CheckpointConfig]:
        """The configuration, its credentials in the environment within the block.

        Raises `ConfigError` as `resolve` does.
        """
        config, credentials = self.resolve()
        with credentials.applied():
            yield config

    def _store(self, store: StoreConfig) -> tuple[StoreConfig, Credentials]:
        credentials = Credentials()
        if self.ckpt_conn_id is not None:
            hook = CheckpointHook(self.ckpt_conn_id)
            store, credentials = hook.store(), hook.credentials()
        if self.store is not None:
            url, conn_id = split_connection(self.store)
            store = replace(store, url=url)
            credentials |= storage_credentials(conn_id)
        return store, credentials

    def _registry(self, registry: RegistryConfig) -> tuple[RegistryConfig, Credentials]:
        registry = self.registry or registry
        if self.mlflow_conn_id is None:
            return registry, Credentials()
        hook = MlflowHook(self.mlflow_conn_id)
        return hook.registry(registry), hook.credentials()

    def _attempt(self, attempt: AttemptConfig) -> AttemptConfig:
        attempt = self.attempt or attempt
        return attempt if self.nproc is None else replace(attempt, nproc=self.nproc)


def _or_each_epoch(schedule: ScheduleConfig) -> ScheduleConfig:
    """The environment's; where it says nothing, one that bounds what a death costs."""
    return schedule if schedule != ScheduleConfig() else ScheduleConfig(every_epochs=1)
