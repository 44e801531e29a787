"""Step 5: point an alias of the registry at a checkpoint, and keep in the store that it does."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, RegistryError, StoreError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, PromotionRecord, now
from ckpt_tasks.registry import Registration, Registry, load_registry
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.tasks.registered import attach
from ckpt_tasks.training.registration.promotions import record_promotion

__all__ = ["Promotion", "promote"]


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """An alias and what it points at now.

    Parameters
    ----------
    unrecorded
        Why the store does not know of it, so that a registry which loses the alias does not get
        it back; ``None`` where it does.
    """

    alias: str
    registration: Registration
    links: dict[str, str]
    unrecorded: str | None = None

    def __str__(self) -> str:
        to = self.registration
        told = f"{to.registered_model}@{self.alias} is version {to.version}: {to.checkpoint}"
        return f"{told}; not kept in the store: {self.unrecorded}" if self.unrecorded else told


def promote(config: CheckpointConfig, run: str, checkpoint: str, alias: str) -> Promotion:
    """Point `alias` at the registered version of a checkpoint.

    The store keeps that, for `reconcile` to do it again in a registry that has lost it.

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
    links = registry.links(registration)
    promotion = Promotion(alias=alias, registration=registration, links=links)
    record = PromotionRecord(
        uid=view.run.uid,
        checkpoint=checkpoint,
        alias=alias,
        registry=registry.name,
        registered_model=registration.registered_model,
        model_id=registration.model_id,
        at=now(),
    )
    try:
        record_promotion(store, RunLayout(run), record)
    except (ConfigError, StoreError) as error:  # the alias stands all the same
        return msgspec.structs.replace(promotion, unrecorded=str(error))
    return promotion


def _record(view: RunView, checkpoint: str) -> CommitRecord:
    records = [c.record for c in view.checkpoints if c.id == checkpoint and c.record]
    if not records:
        raise CheckpointNotFoundError(f"run {view.run.run!r} has no checkpoint {checkpoint}")
    return records[0]
