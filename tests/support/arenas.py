"""Memory that saves share between processes: whatever dies, none of it is left."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.launches import wait_until


@contextmanager
def no_arena_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards no process that was begun in the context holds an arena."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("TEST_MARK", mark)
    yield
    wait_until(lambda: not _holders_of_arenas(mark), "the end of all arenas")


def _holders_of_arenas(mark: str) -> list[int]:
    """Processes begun with `mark` in their environment that map or hold an arena's memory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            marked = mark.encode() in (process / "environ").read_bytes()
            maps = (process / "maps").read_text(encoding="utf-8", errors="replace")
            links = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:  # it has ended
            continue
        if marked and any("ckpt-tasks-arena" in text for text in (maps, *links)):
            found.append(int(process.name))
    return found
