"""What a registry knows of a run, for those who do not train it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_tasks.checkpointer.catalog import RunView
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.registry import Registry, RunDescription, load_registry
from ckpt_tasks.store import Store
from ckpt_tasks.training.registration.registry_ids import read_ids

__all__ = ["attach", "attached_registry"]


@contextmanager
def attached_registry(
    config: RegistryConfig, store: Store, view: RunView
) -> Iterator[Registry | None]:
    """The registry with the run bound; ``None`` where none is configured, or it has no such run.

    Raises
    ------
    RegistryError
        It did not answer.
    ConfigError
        It cannot be used as configured.
    """
    if config.tracking_uri is None:
        yield None
        return
    registry = load_registry(config)
    try:
        records = (c.record for c in view.checkpoints if c.record is not None)
        known = attach(store, registry, view, next(records, None))
        yield registry if known else None
    finally:
        registry.close()


def attach(store: Store, registry: Registry, view: RunView, record: CommitRecord | None) -> bool:
    """Bind the registry to the run of a checkpoint, and leave that run as it is.

    Returns
    -------
    bool
        False: the registry does not know the run yet.

    Raises
    ------
    RegistryError
        The registry did not answer.
    StoreError
        Storage did not answer.
    """
    description = RunDescription(
        run=view.run.run,
        uid=view.run.uid,
        store_url=store.url,
        hyperparameters=record.hyperparameters if record is not None else {},
    )
    layout = RunLayout(view.run.run)
    ids = read_ids(store, layout, registry.name, lambda _: None) or registry.find_run(description)
    if ids is None:
        return False
    registry.attach_run(ids, description)
    return True
