"""Credentials for the processes of a training run: its environment, never a record."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["environment"]


@contextmanager
def environment(credentials: Mapping[str, Any]) -> Iterator[None]:
    """Set environment variables within the block, and put back what they replaced."""
    before = {name: os.environ.get(name) for name in credentials}
    os.environ.update({name: str(value) for name, value in credentials.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
