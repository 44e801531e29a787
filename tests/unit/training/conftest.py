"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    """Forget what earlier tests stored: each look-up in memory passes over all of it."""
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()
