"""Writing past the page cache: the bytes are the same, whatever their number and place."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import _direct
from ckpt_tasks.store.local import LocalStore

MEGABYTE = 1024 * 1024
SIZES = [MEGABYTE, MEGABYTE + 1, 9 * MEGABYTE - 1, 16 * MEGABYTE, 17 * MEGABYTE + 4097]


@pytest.fixture(scope="module")
def memory() -> Iterator[memoryview]:
    """Page-aligned, and no two pages alike."""
    mapping = mmap.mmap(-1, 32 * MEGABYTE)
    view = memoryview(mapping)
    for page in range(0, len(mapping), 4096):
        view[page : page + 8] = page.to_bytes(8, "little")
    yield view
    view.release()


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk, and a file system that may know no direct writes."""
    if request.param == "disk":
        yield tmp_path
        return
    place = Path("/dev/shm") / f"ckpt-tasks-{os.getpid()}"  # noqa: S108
    place.mkdir()
    yield place
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


@pytest.mark.parametrize("size", SIZES)
def test_file_holds_what_was_given(folder: Path, memory: memoryview, size: int) -> None:
    """To the last byte, and not one more."""
    view = memory[:size]
    assert _direct.direct_view([view]) is not None

    LocalStore(str(folder)).write("file", [view], size)

    assert (folder / "file").read_bytes() == bytes(view)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(lambda view: [view[1 : 2 * MEGABYTE]], id="not on a page"),
        pytest.param(lambda view: [view[: MEGABYTE - 1]], id="small"),
        pytest.param(lambda view: [view[:MEGABYTE], b"x"], id="several parts"),
        pytest.param(lambda view: [bytes(view[: 2 * MEGABYTE])], id="no memory of its own"),
        pytest.param(lambda view: iter([view]), id="no list"),
    ],
)
def test_other_memory_is_written_as_ever(tmp_path: Path, memory: memoryview, parts) -> None:
    """Only whole aligned memory can go past the cache; the rest is written all the same."""
    assert _direct.direct_view(parts(memory)) is None
    content = b"".join(bytes(part) for part in parts(memory))

    LocalStore(str(tmp_path)).write("file", parts(memory), len(content))

    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("call", ["_set_direct", "_allocate", "_write_blocks"])
def test_file_system_that_cannot_is_found_out(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At whichever step it refuses, the file is written through the cache instead."""
    original = getattr(_direct, call)
    refused = []

    def refuse(*arguments: object) -> None:
        if arguments[-1] is False:
            original(*arguments)
            return
        refused.append(call)
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(_direct, call, refuse)
    size = 9 * MEGABYTE + 5

    LocalStore(str(tmp_path)).write("file", [memory[:size]], size)

    assert refused == [call]
    assert (tmp_path / "file").read_bytes() == bytes(memory[:size])


def test_full_disk_leaves_nothing(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed before anything is written, and told with what was needed."""

    def allocate(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_direct, "_allocate", allocate)
    with pytest.raises(StoreError, match=f"no space left .*: {2 * MEGABYTE} bytes were needed"):
        LocalStore(str(tmp_path)).write("file", [memory[: 2 * MEGABYTE]], 2 * MEGABYTE)
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    """By the file system itself, when the blocks are reserved."""
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match=r"space|large|argument") as error:
            _direct._allocate(descriptor, 2**61)
        assert error.value.errno in (errno.ENOSPC, errno.EFBIG, errno.EINVAL)
    finally:
        os.close(descriptor)
