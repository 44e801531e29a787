"""What has failed in a save or a load by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.distributed.checkpoint.api import CheckpointException

__all__ = ["plain_failures"]


@contextlib.contextmanager
def plain_failures() -> Iterator[None]:
    """Raise what a rank has raised, and not DCP's wrapper of it.

    It wraps Ctrl-C as well, which would then count as a save that failed.
    """
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        interrupts = [f for f in failures if isinstance(f, KeyboardInterrupt)]
        raise (interrupts or failures)[0] from error
