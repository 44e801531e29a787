"""What the system's errors say of a store on a file system, and what a person can do about each."""

from __future__ import annotations

import errno
import os

from ckpt_tasks.errors import NoSpaceError, StoreError
from ckpt_tasks.sizes import readable_size

__all__ = ["store_error"]


def store_error(error: OSError, verb: str, full: str, *, needed: int, root: str) -> StoreError:
    """The error that a store raises in its place.

    Parameters
    ----------
    verb
        What was being done: ``read``, ``write``, ``create``, ``list``, ``delete``.
    full
        Path of the file.
    needed
        Bytes that were to be written.
    root
        The store's.

    Returns
    -------
    StoreError
        A `NoSpaceError` where bytes that are removed could help.
    """
    failed = f"cannot {verb} {full}: {error.strerror or error}"
    match error.errno:
        case errno.ENOSPC:
            return NoSpaceError(_no_space(full, needed, root))
        case errno.EDQUOT:
            return NoSpaceError(
                f"no space left for {full}: {needed} bytes were needed, and the disk quota of "
                f"{_user()} is used up in {root}; what was written of it is removed. Remove other "
                "files of that user, or have the quota raised"
            )
        case errno.EROFS:
            return StoreError(
                f"{failed}. The file system of {root} has become read-only, as one does when its "
                "device fails: look at the kernel's log, and mount it writable again"
            )
        case errno.EACCES | errno.EPERM:
            return StoreError(f"{failed}. Give {_user()} the permission for {root} again")
        case errno.EFBIG:
            return StoreError(
                f"{failed}. A file of {readable_size(needed)} is more than the limit of this "
                "process (ulimit -f) or the file system allows: raise it, or use another store"
            )
        case _:
            return StoreError(failed)


def _no_space(full: str, needed: int, root: str) -> str:
    try:
        status = os.statvfs(root)
    except OSError:  # gone meanwhile
        return f"no space left for {full}: {needed} bytes were needed; make room in {root}"
    if status.f_files and not status.f_favail:
        return (
            f"no space left for {full}: the file system of {root} has no free inodes, and takes no "
            "more files; remove some there"
        )
    return (
        f"no space left for {full}: {needed} bytes were needed and "
        f"{status.f_bavail * status.f_frsize} are free in {root}; what was written of it is "
        "removed. Make room there: `ckpt-tasks collect` removes what has expired, and "
        "[retention] lets checkpoints expire"
    )


def _user() -> str:
    return f"the user with id {os.geteuid()}"
