"""Which checkpoints aliases were pointed at: kept in the store, for a registry that loses it.

What an alias points at is the registry's to say, and people move aliases there. So a promotion is
only done again together with the registration that it was lost with. An alias is one for all runs
of a registered model: of several runs that were promoted, the last one has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckpt_tasks.errors import ConfigError, CorruptCheckpointError, ObjectNotFoundError
from ckpt_tasks.fencing.attempts import MAX_RECORD_BYTES
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout, last_promotion
from ckpt_tasks.format.records import PromotionRecord
from ckpt_tasks.store.base import Store

__all__ = ["lost_aliases", "record_promotion"]


def record_promotion(store: Store, layout: RunLayout, promotion: PromotionRecord) -> None:
    """Keep that an alias points at a checkpoint now; what it pointed at before is forgotten.

    Raises
    ------
    StoreError
        Storage does not take it.
    """
    store.put(layout.promotion(promotion.alias), encode(promotion))
    store.put(last_promotion(promotion.registered_model, promotion.alias), encode(promotion))


def lost_aliases(
    store: Store, layout: RunLayout, registry: str, unregistered: Collection[str]
) -> Mapping[str, list[str]]:
    """Aliases that a registry has lost, by the checkpoint that they are to point at again.

    Parameters
    ----------
    registry
        The registry's name.
    unregistered
        Ids of the checkpoints of the run that the registry lacks.

    Raises
    ------
    StoreError
        Storage did not answer.
    """
    found: dict[str, list[str]] = {}
    listed = store.list_objects(layout.promotions) if unregistered else []
    for info in listed:
        promotion = _read(store, info.path)
        if (
            promotion is not None
            and promotion.registry == registry
            and promotion.checkpoint in unregistered
            and _is_last(store, promotion)
        ):
            found.setdefault(promotion.checkpoint, []).append(promotion.alias)
    return found


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
