"""Operations of synchronous file systems that block: here of named pipes, which do so for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import deadline
from ckpt_tasks.store.deadline import NoAnswerError, within
from ckpt_tasks.store.filesystem import BoundedFileSystem
from ckpt_tasks.store.generic import FsspecStore

SAYS = r"no answer within 0 seconds; see whether the network and the store are up"


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "BASE_SECONDS", 0.2)
    monkeypatch.setattr(deadline, "LEAST_RATE", 1e12)


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def test_what_blocks_is_given_up(pipe: str) -> None:
    """It raises in time; a further try, and what comes after, has a file system of its own."""
    first = LocalFileSystem(skip_instance_cache=True)
    files = BoundedFileSystem(first)
    with pytest.raises(NoAnswerError, match=SAYS):
        files.call("cat_file", pipe)
    assert files.call("info", pipe)["name"] == pipe
    assert files._fs is not first
    Path(pipe).unlink()
    with pytest.raises(FileNotFoundError):
        files.call("cat_file", pipe)


def test_given_up_writes_hold_no_memory_of_the_caller(pipe: str) -> None:
    """What such a write still sends is what it was given, and not what its memory became."""
    size = 1024 * 1024  # more than a pipe takes
    memory = bytearray(b"\1" * size)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files = BoundedFileSystem(LocalFileSystem())
    with pytest.raises(NoAnswerError, match=SAYS), files.open_to_write(pipe) as file:
        file.write(memory)
    memory[:] = b"\2" * size
    os.set_blocking(reader, True)
    with open(reader, "rb") as arrived:
        assert arrived.read() == b"\1" * size


def test_a_store_says_what_did_not_answer(tmp_path: Path, pipe: str) -> None:
    """Its error names the object in the store, and may be retried."""
    store = FsspecStore(LocalFileSystem(), str(tmp_path), "sftp://host/store")
    with pytest.raises(StoreError, match=rf"cannot write sftp://host/store/pipe: .*{SAYS}"):
        store.replace("pipe", [b"bytes"], 5)
    assert not store.exists("pipe")


def test_a_given_up_operation_keeps_no_process(pipe: str) -> None:
    """The interpreter ends while one still blocks."""
    code = f"""if True:
        from ckpt_tasks.store.deadline import NoAnswerError, within
        try:
            within(0.1, lambda: open({pipe!r}).read())
        except NoAnswerError:
            print("given up")"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "given up\n"


def test_progress_puts_a_deadline_off() -> None:
    """What gets on is waited for, however long it takes in all."""
    steps, ended = iter(range(5)), threading.Event()

    def progressed() -> float:
        if next(steps, None) is None:
            ended.set()
        return time.monotonic()

    assert within(0.05, ended.wait, progressed=progressed)
