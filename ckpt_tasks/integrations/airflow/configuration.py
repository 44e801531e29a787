"""Where an operator's configuration comes from: its arguments, connections, the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from msgspec.structs import replace

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    ScheduleConfig,
    load_config,
)
from ckpt_tasks.integrations.airflow.hooks import (
    CheckpointHook,
    MlflowHook,
    split_connection,
    storage_credentials,
)

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator was given; ``None`` leaves it to the connection or the environment."""

    store: str | None = None
    ckpt_conn_id: str | None = None
    mlflow_conn_id: str | None = None
    registry: RegistryConfig | None = None
    schedule: ScheduleConfig | None = None
    attempt: AttemptConfig | None = None

    @contextmanager
    def applied(self) -> Iterator[CheckpointConfig]:
        """The configuration, its credentials in the environment within the block.

        Raises `ConfigError` for connections that are missing or cannot work.
        """
        config = load_config()
        with ExitStack() as stack:
            config = self._with_store(config, stack)
            config = self._with_registry(config, stack)
            yield replace(
                config,
                schedule=self.schedule or config.schedule,
                attempt=self.attempt or config.attempt,
            )

    def _with_store(self, config: CheckpointConfig, stack: ExitStack) -> CheckpointConfig:
        store = config.store
        if self.ckpt_conn_id is not None:
            hook = CheckpointHook(self.ckpt_conn_id)
            store = hook.store()
            stack.enter_context(hook.credentials())
        if self.store is not None:
            url, conn_id = split_connection(self.store)
            store = replace(store, url=url)
            stack.enter_context(storage_credentials(conn_id))
        return replace(config, store=store)

    def _with_registry(self, config: CheckpointConfig, stack: ExitStack) -> CheckpointConfig:
        registry = self.registry or config.registry
        if self.mlflow_conn_id is not None:
            hook = MlflowHook(self.mlflow_conn_id)
            registry = hook.registry(registry)
            stack.enter_context(hook.credentials())
        return replace(config, registry=registry)
