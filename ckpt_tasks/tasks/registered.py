"""What a registry knows of a run, for those who do not train it."""

from __future__ import annotations

from ckpt_tasks.checkpointer.catalog import RunView
from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RegistryRunIds
from ckpt_tasks.registry import Registry, RunDescription
from ckpt_tasks.store import Store

__all__ = ["attach"]

_MAX_IDS_BYTES = 64 * 1024


def attach(store: Store, registry: Registry, view: RunView, record: CommitRecord) -> bool:
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
        hyperparameters=record.hyperparameters,
    )
    ids = _ids(store, registry, description)
    if ids is None:
        return False
    registry.attach_run(ids, description)
    return True


def _ids(store: Store, registry: Registry, description: RunDescription) -> RegistryRunIds | None:
    """The ids that the store keeps, or those that a search for the run's uid finds."""
    path = RunLayout(description.run).registry_ids(registry.name)
    try:
        return decode(store.read(path, limit=_MAX_IDS_BYTES), RegistryRunIds, path=path)
    except (ObjectNotFoundError, CorruptCheckpointError):
        return registry.find_run(description)
