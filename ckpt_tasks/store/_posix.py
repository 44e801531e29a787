"""System calls that `LocalStore` needs and Python does not offer in one piece."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ckpt_tasks.errors import ConfigError

__all__ = [
    "publish_exclusively",
    "write_all",
]

_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_PARTS = 512  # below IOV_MAX, which is 1024 on Linux
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_RENAME_NOREPLACE = 1
_SYNC_FILE_RANGE_WRITE = 2


def write_all(descriptor: int, parts: Iterable[Any]) -> None:
    """Write bytes-like `parts` to a new file, small ones together in one system call.

    The device begins with each batch while the next one is copied; the fsync that follows finds
    little left to do.
    """
    batch: list[memoryview] = []
    pending = written = 0
    for view in _pieces(parts):
        batch.append(view)
        pending += view.nbytes
        if pending >= _BATCH_BYTES or len(batch) == _BATCH_PARTS:
            _write_batch(descriptor, batch)
            _start_writeback(descriptor, written, pending)
            written += pending
            batch, pending = [], 0
    _write_batch(descriptor, batch)


def _pieces(parts: Iterable[Any]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, view.nbytes, _BATCH_BYTES):
            yield view[start : start + _BATCH_BYTES]


def _start_writeback(descriptor: int, start: int, size: int) -> None:
    """Have the device begin to write what was written; returns at once (sync_file_range(2)).

    A hint: where it is not possible, an fsync takes longer and does the same.
    """
    hint = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if hint is not None and size >= _BATCH_BYTES:
        hint(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def _write_batch(descriptor: int, batch: list[memoryview]) -> None:
    """Write all of `batch`; the system may take only part of it in one call."""
    batch = [view for view in batch if view.nbytes]
    while batch:
        written = os.writev(descriptor, batch)
        while batch and written >= batch[0].nbytes:
            written -= batch.pop(0).nbytes
        if written:
            batch[0] = batch[0][written:]


def publish_exclusively(folder: int, temporary: str, name: str) -> None:
    """Give a file the name `name` in the same folder, atomically and only if that name is free.

    Raises
    ------
    FileExistsError
        The name is taken.
    ConfigError
        The file system can do this neither by hard links nor by ``RENAME_NOREPLACE``.
    """
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_exclusively(folder, temporary, name)


def _rename_exclusively(folder: int, temporary: str, name: str) -> None:
    """``renameat2(2)``, which glibc has since 2.28 and Python does not offer."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    failed = errno.ENOSYS
    if rename is not None:
        source, target = os.fsencode(temporary), os.fsencode(name)
        if rename(folder, source, folder, target, _RENAME_NOREPLACE) == 0:
            return
        failed = ctypes.get_errno()
    if failed in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise ConfigError(
            f"the file system of {name} has neither hard links nor an exclusive rename, so two "
            "attempts could commit at once; keep the store on another one"
        )
    raise OSError(failed, os.strerror(failed), name)
