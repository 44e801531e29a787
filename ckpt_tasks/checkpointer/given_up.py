"""What ranks have written for saves of which nothing was committed.

A rank that has written its part does not know what became of the others'. So whoever commits for
all removes it: no collection may come, or it comes too late for a disk that is full of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable

from ckpt_tasks.errors import StoreError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Index
from ckpt_tasks.store.base import Store

__all__ = ["GivenUpWrites"]


class GivenUpWrites:
    """Those of one attempt, on rank 0. What the store does not let go is left to a collection."""

    def __init__(self, store: Store, layout: RunLayout) -> None:
        self._store = store
        self._layout = layout
        self._write_ids: list[str] = []

    def add(self, write_id: str) -> None:
        """Nobody will commit this one. What there is of earlier ones is removed.

        Not yet of this: the next save, which may have been agreed on before this one failed, may
        refer to what some rank has written for it. The one after that does not.
        """
        self._remove(but=())
        self._write_ids.append(write_id)

    def settle(self, indexes: Iterable[Index]) -> None:
        """A later write was committed: no rank writes for an earlier one any more, or refers to
        what that commit does not.

        Parameters
        ----------
        indexes
            Of the commit, which may refer to some of it.
        """
        if self._write_ids:
            named = {self._layout.in_run(file.path) for index in indexes for file in index.files}
            self._remove(but=named)
            self._write_ids.clear()

    def leave(self) -> None:
        """Whether a later write was committed is unknown, and it may refer to any of it."""
        self._write_ids.clear()

    def _remove(self, *, but: Collection[str]) -> None:
        for write_id in self._write_ids:
            folder = self._layout.in_run(self._layout.write_folder_in_run(write_id))
            with contextlib.suppress(StoreError):
                for info in self._store.list_objects(f"{folder}/"):
                    if info.path not in but:
                        self._store.delete(info.path)
