"""What the registry holds. Where that is not known, nothing may be marked and nothing deleted."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tasks.errors import RegistryError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry.base import Registry
from ckpt_tasks.store.base import Store

__all__ = ["what_is_held"]


def what_is_held(
    store: Store, layout: RunLayout, registry: Registry | None
) -> dict[str, Sequence[str]]:
    """What the registry needs of the run, by checkpoint id, each with reasons.

    Raises
    ------
    RegistryError
        It did not answer; or the run is in a registry, and none is given to ask.
    """
    if registry is not None:
        return dict(registry.held())
    known = [path for path in _ids_files(store, layout) if path != layout.run_record]
    if known:
        raise RegistryError(
            f"run {layout.run!r} is in a registry ({known[0]}) that was not given, so what its "
            "aliases hold is not known; give --tracking-uri, or registry.tracking_uri"
        )
    return {}


def _ids_files(store: Store, layout: RunLayout) -> list[str]:
    """Records right in the run's folder: its own, and one for each registry that knows it."""
    return [
        info.path
        for info in store.list_objects(layout.folder)
        if "/" not in info.path.removeprefix(layout.folder) and info.path.endswith(".json")
    ]
