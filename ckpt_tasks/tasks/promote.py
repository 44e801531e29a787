"""Step 5: point an alias of the registry at a checkpoint."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, RegistryError
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.registry import Registration, Registry, load_registry
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.tasks.registered import attach

__all__ = ["Promotion", "promote"]


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """An alias and what it points at now."""

    alias: str
    registration: Registration
    links: dict[str, str]

    def __str__(self) -> str:
        to = self.registration
        return f"{to.registered_model}@{self.alias} is version {to.version}: {to.checkpoint}"


def promote(config: CheckpointConfig, run: str, checkpoint: str, alias: str) -> Promotion:
    """Point `alias` at the registered version of a checkpoint.

    Parameters
    ----------
    config
        Names the store and the registry.
    run, checkpoint
        Which checkpoint; it must be registered.
    alias
        Name of the alias, sanitised by the registry.

    Raises
    ------
    RegistryError
        The registry did not answer, or does not know the checkpoint yet; worth repeating.
    ConfigError
        No registry is configured, or the configured one cannot be used.
    CheckpointNotFoundError
        There is no such run or checkpoint.
    """
    if config.registry.tracking_uri is None:
        raise ConfigError("no registry is configured: set registry.tracking_uri to promote")
    store = open_store(config.store)
    registry = load_registry(config.registry)
    try:
        return _promote(store, registry, run, checkpoint, alias)
    finally:
        registry.close()
        store.close()


def _promote(store: Store, registry: Registry, run: str, checkpoint: str, alias: str) -> Promotion:
    view = view_run(store, run)
    if not attach(store, registry, view, _record(view, checkpoint)):
        raise RegistryError(
            f"{registry.name} does not know run {run!r} yet; try again when it has caught up"
        )
    registration = registry.registered().get(checkpoint)
    if registration is None:
        raise RegistryError(
            f"checkpoint {checkpoint} of run {run!r} is not registered yet, so alias {alias!r} "
            "cannot point at it; try again when the registry has caught up"
        )
    registry.set_alias(alias, registration)
    return Promotion(alias=alias, registration=registration, links=registry.links(registration))


def _record(view: RunView, checkpoint: str) -> CommitRecord:
    records = [c.record for c in view.checkpoints if c.id == checkpoint and c.record]
    if not records:
        raise CheckpointNotFoundError(f"run {view.run.run!r} has no checkpoint {checkpoint}")
    return records[0]
