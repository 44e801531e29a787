"""Writing past the page cache: the bytes are the same, whatever their number and place."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import _direct, _posix
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
    assert _direct.direct_source([view], size) is not None

    LocalStore(str(folder)).write("file", [view], size)

    assert (folder / "file").read_bytes() == bytes(view)


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_brought_together(folder: Path, memory: memoryview, size: int) -> None:
    """Whatever their sizes and places, and though they are more than the blocks in use at once."""
    odd = [memory[start : min(start + 700_001, size)] for start in range(0, size, 700_001)]
    parts = [bytes(odd[0]), b"", *odd[1:]]
    assert isinstance(_direct.direct_source(parts, size), _direct._Gathered)

    LocalStore(str(folder)).write("file", parts, size)

    assert (folder / "file").read_bytes() == bytes(memory[:size])


def test_gathering_takes_a_few_blocks_of_memory(tmp_path: Path, memory: memoryview) -> None:
    """They are used again, each when what was in it is written."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    parts = [memory[: 16 * MEGABYTE], memory[1 : 16 * MEGABYTE]] * 4
    size = sum(part.nbytes for part in parts)
    source = _direct.direct_source(parts, size)
    assert source is not None
    blocks: set[int] = set()
    block = source.block

    def watch(start: int, stop: int, into: memoryview | None) -> memoryview:
        blocks.add(id(into))
        return block(start, stop, into)

    source.block = watch  # type: ignore[method-assign]
    try:
        assert _direct.write_direct(descriptor, source, size)
        assert len(blocks) == 3 + 1  # the last bytes, less than a page, are no block
        assert os.pread(descriptor, size, 0) == b"".join(parts)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(lambda view: [view[: MEGABYTE - 1]], id="small"),
        pytest.param(lambda view: iter([view]), id="no list"),
    ],
)
def test_little_is_written_as_ever(tmp_path: Path, memory: memoryview, parts) -> None:
    """Where preparing the file costs more than is gained, or all would have to be held."""
    content = b"".join(bytes(part) for part in parts(memory))
    assert _direct.direct_source(parts(memory), len(content)) is None

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


def test_the_device_begins_before_all_is_in_the_cache(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the cache each batch is handed to the device while the next one is copied."""
    begun: list[tuple[int, int, int]] = []

    def begin(descriptor: int, start: int, size: int) -> None:
        begun.append((start, size, os.fstat(descriptor).st_size))

    monkeypatch.setattr(_direct, "_allocate", _refuse)
    monkeypatch.setattr(_posix, "_start_writeback", begin)

    LocalStore(str(tmp_path)).write("file", [memory[: 20 * MEGABYTE]], 20 * MEGABYTE)

    # Start, size, and how large the file was then.
    eight = 8 * MEGABYTE
    assert begun == [(0, eight, eight), (eight, eight, 2 * eight)]


def _refuse(*arguments: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not here")


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
