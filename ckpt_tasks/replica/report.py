"""What a copy has done."""

from __future__ import annotations

import msgspec

from ckpt_tasks.sizes import readable_size

__all__ = ["CopyReport", "NotCopied"]


class NotCopied(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was not copied, and why."""

    checkpoint: str
    why: str


class CopyReport(msgspec.Struct, kw_only=True):
    """What a copy has done.

    Parameters
    ----------
    run, uid
        The run's name and identity, which are the replica's too.
    source, target
        URLs of the two stores, userinfo masked.
    copied, there
        Checkpoints that were copied now, and those that an earlier copy had brought; oldest first.
    left
        Those that the source has given up: quarantined, or collected meanwhile.
    damaged
        Those of which the source has other bytes than were committed.
    files, size
        How many objects, and bytes of them, were copied now.
    seconds
        How long it took.
    """

    run: str
    uid: str
    source: str
    target: str
    copied: list[str] = []
    there: list[str] = []
    left: list[NotCopied] = []
    damaged: list[NotCopied] = []
    files: int = 0
    size: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        many = "" if len(self.copied) == 1 else "s"
        told = f"{len(self.copied)} checkpoint{many} copied ({readable_size(self.size)})"
        if self.there:
            told += f", {len(self.there)} there already"
        if self.damaged:
            told += f", {len(self.damaged)} damaged"
        return told
