"""The event log where its disk is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_disk import SmallDisk, small_disk

from ckpt_tasks import events
from ckpt_tasks.events import EventLog, EventReader, Warned


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 8 MiB, all of it this test's."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    with small_disk(tmp_path / "disk", size=8 * 2**20) as disk:
        yield disk


def _messages(path: Path) -> list[str]:
    return [event.message for event in EventReader(path).read() if isinstance(event, Warned)]


def test_events_wait_for_room(disk: SmallDisk) -> None:
    """Nothing is raised, and nothing is lost, cut or out of order once there is room again."""
    path = disk.path / "events"
    log = EventLog(path)
    log(Warned(message="before"))
    disk.fill(leaving=0)
    sent = [f"{number} {'x' * 1000}" for number in range(20)]
    for message in sent:
        log(Warned(message=message))
    assert len(_messages(path)) < 1 + len(sent)
    disk.make_room()
    log(Warned(message="after"))
    log.close()
    assert _messages(path) == ["before", *sent, "after"]


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not filled as well: beyond a limit the full disk is an error."""
    monkeypatch.setattr(events, "_MAX_UNWRITTEN", 2000)
    log = EventLog("/dev/full")
    log(Warned(message="x" * 1000))
    with pytest.raises(OSError, match="No space left"):
        log(Warned(message="x" * 1000))
