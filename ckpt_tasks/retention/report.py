"""What a collection did."""

from __future__ import annotations

import msgspec

from ckpt_tasks.sizes import readable_size

__all__ = ["CollectReport", "Remaining"]


class Remaining(msgspec.Struct, frozen=True):
    """An expired checkpoint that is still there, and why."""

    checkpoint: str
    why: str


class CollectReport(msgspec.Struct, kw_only=True):
    """What a collection removed, or (of a dry run) would remove.

    Parameters
    ----------
    removed
        Checkpoints, oldest first.
    waiting, kept
        Expired ones that are within their grace, and that must stay.
    leftovers
        Folders of writes that were never committed, or of which nothing is needed any more.
    uploads
        Uploads that were begun and never completed.
    freed
        Bytes.
    verified
        The checkpoint that was known to be whole before older ones were removed.
    refused
        Why nothing more was deleted; ``None`` where nothing stood in the way.
    """

    run: str
    removed: list[str] = []
    waiting: list[Remaining] = []
    kept: list[Remaining] = []
    leftovers: list[str] = []
    uploads: int = 0
    freed: int = 0
    verified: str | None = None
    refused: str | None = None

    def __str__(self) -> str:
        told = [
            f"{len(self.removed)} checkpoints and {len(self.leftovers)} leftovers removed, "
            f"{readable_size(self.freed)}"
        ]
        if self.waiting:
            told.append(f"{len(self.waiting)} wait for their grace")
        if self.kept:
            told.append(f"{len(self.kept)} stay")
        if self.refused is not None:
            told.append(f"stopped: {self.refused}")
        return f"run {self.run!r}: {'; '.join(told)}"
