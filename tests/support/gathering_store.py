"""A store through which rank 0 finds what other ranks write at its first look."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ckpt_tasks.testing import FaultyStore
from ckpt_tasks.testing.wrappers import WrapperStore

_OF_ANOTHER_RANK = re.compile(
    r"/data/a[0-9]+-s(?P<number>[0-9]+)-[^/]+/rank(?!0000)[0-9]+\.index\.json$", re.ASCII
)


class GatheringStore(WrapperStore):
    """Waits for another rank's index before it is read, so that reads have the same numbers always.

    It looks for it as gathering does by reading again and again: until it is there, or somebody has
    told that it will not be.

    Parameters
    ----------
    store
        Its operations are counted.
    failures
        Where failures of saves are told (see `ckpt_tasks.checkpointer.failures`).
    """

    def __init__(self, store: FaultyStore, failures: Path) -> None:
        super().__init__(store)
        self._uncounted = store.store
        self._failures = failures

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        found = _OF_ANOTHER_RANK.search(path)
        if found:
            told = [self._failures / str(int(found["number"])), self._failures / "every"]
            while not (self._uncounted.exists(path) or any(file.exists() for file in told)):
                time.sleep(0.005)
        return super().read(path, limit=limit)
