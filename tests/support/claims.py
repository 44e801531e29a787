"""Claims as another host would have written them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ckpt_tasks.format.codec import decode, encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import AttemptClaim


def move_claim_elsewhere(root: Path, run: str, attempt: int) -> None:
    """Rewrite a claim in a local store so that its process cannot be looked at from here."""
    path = root / RunLayout(run).attempt(attempt)
    claim = decode(path.read_bytes(), AttemptClaim, path=str(path))
    process = msgspec.structs.replace(claim.process, host="another-host", boot_id="another-boot")
    temporary = path.with_suffix(".elsewhere")
    temporary.write_bytes(encode(msgspec.structs.replace(claim, process=process)))
    temporary.replace(path)
