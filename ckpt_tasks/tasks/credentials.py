"""Credentials for the processes of a training run: its environment, never a record."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["environment"]


@contextmanager
def environment(credentials: Mapping[str, Any]) -> Iterator[None]:
    """Set environment variables within the block, and put back what they replaced.

    Parameters
    ----------
    credentials
        Values by name; ``None`` for a variable that must not be set within the block.
    """
    before = {name: os.environ.get(name) for name in credentials}
    _set(credentials)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, Any]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = str(value)
