"""System calls that `LocalStore` needs and Python does not offer in one piece."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from typing import Any

from ckpt_tasks.errors import ConfigError

__all__ = ["fsync_folder", "no_space_message", "publish_exclusively", "write_all"]

_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_PARTS = 512  # below IOV_MAX, which is 1024 on Linux
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def fsync_folder(folder: str) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, parts: Iterable[Any]) -> None:
    """Write bytes-like `parts`, small ones together in one system call."""
    batch: list[memoryview] = []
    pending = 0
    for part in parts:
        view = memoryview(part).cast("B")
        batch.append(view)
        pending += view.nbytes
        if pending >= _BATCH_BYTES or len(batch) == _BATCH_PARTS:
            _write_batch(descriptor, batch)
            batch, pending = [], 0
    _write_batch(descriptor, batch)


def _write_batch(descriptor: int, batch: list[memoryview]) -> None:
    """Write all of `batch`; the system may take only part of it in one call."""
    batch = [view for view in batch if view.nbytes]
    while batch:
        written = os.writev(descriptor, batch)
        while batch and written >= batch[0].nbytes:
            written -= batch.pop(0).nbytes
        if written:
            batch[0] = batch[0][written:]


def publish_exclusively(temporary: str, full: str) -> None:
    """Give the file `temporary` the name `full`, atomically and only if that name is free.

    Raises
    ------
    FileExistsError
        The name is taken.
    ConfigError
        The file system can do this neither by hard links nor by ``RENAME_NOREPLACE``.
    """
    try:
        os.link(temporary, full)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_exclusively(temporary, full)


def _rename_exclusively(temporary: str, full: str) -> None:
    """``renameat2(2)``, which glibc has since 2.28 and Python does not offer."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    failed = errno.ENOSYS
    if rename is not None:
        source, target = os.fsencode(temporary), os.fsencode(full)
        if rename(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
            return
        failed = ctypes.get_errno()
    if failed in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise ConfigError(
            f"the file system of {full} has neither hard links nor an exclusive rename, so two "
            "attempts could commit at once; keep the store on another one"
        )
    raise OSError(failed, os.strerror(failed), full)


def no_space_message(full: str, needed: int, root: str) -> str:
    """What was needed and what is left, for people who must now make room."""
    free = shutil.disk_usage(root).free
    return (
        f"no space left for {full}: {needed} bytes were needed and {free} are free (or a quota is "
        f"used up) in {root}; what was written of it is removed"
    )
