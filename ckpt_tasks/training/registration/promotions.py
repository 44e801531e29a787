"""Which checkpoints aliases were pointed at: kept in the store, for a registry that loses it.

What an alias points at is the registry's to say, and people move and remove aliases there. So a
promotion is done again only where the registration that it was of is gone. An alias is one for all
runs of a registered model: of several runs that were promoted, the last one has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckpt_tasks.errors import (
    ConfigError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    RegistryRefusedError,
)
from ckpt_tasks.events import EventSink, Warned
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout, last_promotion
from ckpt_tasks.format.records import PromotionRecord
from ckpt_tasks.registry.base import Registration, Registry
from ckpt_tasks.store.base import Store

__all__ = ["LostPromotions", "find_lost", "record_promotion"]


def record_promotion(store: Store, layout: RunLayout, promotion: PromotionRecord) -> None:
    """Keep that an alias points at a checkpoint now; what it pointed at before is forgotten.

    Raises
    ------
    StoreError
        Storage does not take it.
    """
    store.put(layout.promotion(promotion.alias), encode(promotion))
    store.put(last_promotion(promotion.registered_model, promotion.alias), encode(promotion))


def find_lost(
    store: Store, layout: RunLayout, registry: str, models: Mapping[str, str | None]
) -> Mapping[str, list[PromotionRecord]]:
    """Promotions that went with the registration which they were of, by checkpoint.

    Their aliases are lost where nothing holds them.

    Parameters
    ----------
    registry
        The registry's name.
    models
        Of each checkpoint, the `Registration.model_id` that it has now; ``None`` where it has none.

    Raises
    ------
    StoreError
        Storage did not answer.
    """
    found: dict[str, list[PromotionRecord]] = {}
    for info in store.list_objects(layout.promotions):
        promotion = _read(store, info.path)
        if (
            promotion is not None
            and promotion.registry == registry
            and models.get(promotion.checkpoint, promotion.model_id) != promotion.model_id
            and _is_last(store, promotion)
        ):
            found.setdefault(promotion.checkpoint, []).append(promotion)
    return found


class LostPromotions:
    """Does promotions again that a registry has lost, in the name of an attempt."""

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        registry: Registry,
        fence: Fence,
        on_event: EventSink,
    ) -> None:
        self._store = store
        self._layout = layout
        self._registry = registry
        self._fence = fence
        self._on_event = on_event
        self._lost: Mapping[str, list[PromotionRecord]] = {}

    def find(self, models: Mapping[str, str | None]) -> None:
        """Look which ones there are; `models` as `find_lost`."""
        self._lost = find_lost(self._store, self._layout, self._registry.name, models)

    def bring_back(self, checkpoint: str, registration: Registration) -> None:
        """Point the aliases that a checkpoint has lost at what it is registered as now.

        What something else holds by now is left there. An alias that the registry refuses is told.
        Other errors as the registry's, the store's and the fence's; worth repeating.
        """
        for promotion in self._lost.get(checkpoint, ()):
            holder = self._registry.alias_holder(promotion.alias, "step")
            if holder is not None and holder.checkpoint != checkpoint:
                continue
            self._fence.check()
            try:
                self._registry.set_alias(promotion.alias, registration)
            except RegistryRefusedError as error:  # which is no fault of the checkpoint's
                told = f"alias {promotion.alias!r} is not brought back: {error}"
                self._on_event(Warned(message=told))
                continue
            done = msgspec.structs.replace(
                promotion,
                registered_model=registration.registered_model,
                model_id=registration.model_id,
            )
            record_promotion(self._store, self._layout, done)


def _is_last(store: Store, promotion: PromotionRecord) -> bool:
    """Whether no other run has got the alias since."""
    try:
        path = last_promotion(promotion.registered_model, promotion.alias)
    except ConfigError:  # names that none of ours has
        return False
    last = _read(store, path)
    return last is None or last.uid == promotion.uid


def _read(store: Store, path: str) -> PromotionRecord | None:
    """``None`` where there is none, or a damaged one, which promises nothing."""
    try:
        return decode(store.read(path, limit=MAX_RECORD_BYTES), PromotionRecord, path=path)
    except (ObjectNotFoundError, CorruptCheckpointError):
        return None
