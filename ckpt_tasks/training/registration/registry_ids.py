"""Which run of a registry a training run is: the store decides."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import RegistryRunIds
from ckpt_tasks.registry.base import Registry, RunDescription
from ckpt_tasks.store.ambiguity import create_once
from ckpt_tasks.store.base import Store

__all__ = ["choose_ids", "read_ids"]


def read_ids(
    store: Store, layout: RunLayout, registry: str, tell: Callable[[str], None]
) -> RegistryRunIds | None:
    """The ids that the store keeps; ``None`` where there are none, or damaged ones: that is told.

    Parameters
    ----------
    registry
        The registry's name.
    """
    path = layout.registry_ids(registry)
    try:
        return decode(store.read(path, limit=MAX_RECORD_BYTES), RegistryRunIds, path=path)
    except ObjectNotFoundError:
        return None
    except CorruptCheckpointError as error:
        tell(f"{path}: {error}; searching the run in the registry")
        return None


def choose_ids(
    store: Store,
    layout: RunLayout,
    registry: Registry,
    description: RunDescription,
    fence: Fence,
    tell: Callable[[str], None],
) -> RegistryRunIds:
    """The run's ids: from the store, or by search, or newly made.

    Errors as the registry's and the fence's: a stale attempt makes no run.
    """
    path = layout.registry_ids(registry.name)
    known = read_ids(store, layout, registry.name, tell)
    if known is not None:
        return known
    found = registry.find_run(description)
    if found is None:
        fence.check()
    ids = found or registry.create_run(description)
    if create_once(store, path, encode(ids)):
        return ids
    chosen = read_ids(store, layout, registry.name, tell)
    if chosen is None:
        store.put(path, encode(ids))  # damaged: what the search found replaces it
        return ids
    if found is None and chosen.run_id != ids.run_id:
        registry.discard_run(ids)
    return chosen
