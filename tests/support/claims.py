"""Claims as another host would have written them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import AttemptClaim
from ckpt_tasks.store import open_store


def move_claim_elsewhere(place: StoreConfig | Path, run: str, attempt: int) -> None:
    """Rewrite a claim so that its process cannot be looked at from here."""
    path = RunLayout(run).attempt(attempt)
    with open_store(str(place) if isinstance(place, Path) else place) as store:
        claim = decode(store.read(path), AttemptClaim, path=path)
        process = msgspec.structs.replace(
            claim.process, host="another-host", boot_id="another-boot"
        )
        store.put(path, encode(msgspec.structs.replace(claim, process=process)))
