"""The person in front of the demo: whether there is one, and when they have seen enough."""

from __future__ import annotations

import contextlib
import signal
import sys

__all__ = ["is_there", "wait_until_seen"]


def is_there() -> bool:
    """Whether somebody can press Enter."""
    return sys.stdin.isatty()


def wait_until_seen() -> None:
    """Wait for Enter or Ctrl-C; without a terminal, for the signal."""
    with contextlib.suppress(KeyboardInterrupt):
        if is_there():
            sys.stdin.readline()
        else:
            signal.pause()
