"""What others know of a save that rank 0's writer waits for: that a rank's part will not come.

One small file for each save, in a folder on this machine: the writer is busy, and has no ear for
its socket, while it waits for the other ranks; and its trainer may be dead.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ckpt_tasks.types import CheckpointId

__all__ = ["failure_of", "tell_end", "tell_failure"]

_END = "end"


def tell_failure(folder: Path, number: int, why: str) -> None:
    """Have the writer give up the save of this number."""
    _tell(folder, str(number), why)


def tell_end(folder: Path, why: str) -> None:
    """Have it give up whatever it waits for: all who could write a part have ended."""
    _tell(folder, _END, why)


def failure_of(folder: Path, checkpoint: str) -> str | None:
    """Why a rank's part of a checkpoint will not come; ``None`` where nobody has said so."""
    number = CheckpointId.parse(checkpoint).sequence
    for name in (str(number), _END):
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).read_text(encoding="utf-8")
    return None


def _tell(folder: Path, name: str, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}"
    temporary.write_text(why, encoding="utf-8")
    os.replace(temporary, folder / name)
