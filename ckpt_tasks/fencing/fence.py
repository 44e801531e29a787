"""The fence: an attempt is stale as soon as a later one is claimed."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt_tasks.errors import StaleAttemptError, StoreError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.base import Store

__all__ = ["Fence"]


class Fence:
    """Tells whether `attempt` still owns its run.

    Claims are dense, so one uncached request answers: does the next attempt's claim exist?
    """

    def __init__(self, store: Store, layout: RunLayout, attempt: int) -> None:
        self._store = store
        self._layout = layout
        self.attempt = attempt

    def check(self) -> None:
        """Return while this attempt owns the run.

        Raises
        ------
        StaleAttemptError
            A later attempt was claimed. Never retried.
        StoreError
            The store did not answer: nothing may be registered, published or pruned.
        """
        if self._store.exists(self._layout.attempt(self.attempt + 1)):
            raise StaleAttemptError(
                f"attempt {self.attempt} of run {self._layout.run!r} is stale: attempt "
                f"{self.attempt + 1} has been claimed and owns the run now; this process stops "
                "and leaves the store and the registry as they are"
            )

    def check_claimed(self) -> None:
        """Return while the store holds this attempt's claim, where it may be unmounted.

        What is written to the empty folder that this leaves belongs to no run, and vanishes below
        the next mount.

        Raises
        ------
        StoreError
            It does not, or did not answer. It may yet again, so this is worth a retry.
        """
        path = self._layout.attempt(self.attempt)
        if self._store.is_mounted and not self._store.exists(path):
            raise StoreError(
                f"{self._store.url}/{path} is gone, the claim of the attempt that goes on here: "
                "its file system was unmounted, or somebody has removed the run. Mount it again; "
                "nothing is written meanwhile"
            )

    def wait(
        self,
        *,
        seconds: float,
        pause: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Like `check`, but ask an unreachable store again for up to `seconds`."""
        deadline = clock() + seconds
        while True:
            try:
                return self.check()
            except StoreError:
                if clock() >= deadline:
                    raise
            sleep(pause)
