"""What a trainer knows of a save that its writer waits for: that a rank's part will not come.

One small file for each save, in a folder on this machine: the writer is busy, and has no ear for
its socket, while it waits for the other ranks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ckpt_tasks.types import CheckpointId

__all__ = ["failure_of", "tell_failure"]

_EVERY = "every"


def tell_failure(folder: Path, number: int | None, why: str) -> None:
    """Have the writer give up the save of this number; ``None``: any whose parts are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _EVERY if number is None else str(number)
    temporary = folder / f".{name}"
    temporary.write_text(why, encoding="utf-8")
    os.replace(temporary, folder / name)


def failure_of(folder: Path, checkpoint: str) -> str | None:
    """Why a rank's part of a checkpoint will not come; ``None`` where nobody has said so."""
    for name in (str(CheckpointId.parse(checkpoint).sequence), _EVERY):
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).read_text(encoding="utf-8")
    return None
