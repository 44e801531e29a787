"""Folders and files below a root, reached through no symbolic link.

Others may have put things into a store. Through a link in the place of a folder, reading would
tell and collecting would remove what lies anywhere else. So each part of a path is opened
relative to the one before it, by ``openat(2)`` with ``O_NOFOLLOW``: there is no moment between a
check and its use. The root itself may lie behind links; its user has chosen it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

__all__ = [
    "LinkError",
    "entries",
    "make_root",
    "open_file",
    "open_folder",
    "opened_folder",
    "status",
    "sync_folder",
]

# O_PATH needs no permission to list what is only passed through.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A pipe in the place of a file would have its reader wait for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LinkError(OSError):
    """Something below a root is a symbolic link."""


def open_folder(parent: int | str, name: str) -> int:
    """Descriptor of a folder to reach others by; of a root, where `parent` is its path.

    Raises `LinkError` where a folder in another is a link.
    """
    if isinstance(parent, str):
        return os.open(os.path.join(parent, name), _FOLDER)
    with _links_refused(parent, name):
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)


@contextlib.contextmanager
def opened_folder(root: str, folder: str) -> Iterator[int]:
    """Descriptor of a folder by its path relative to `root`, of the root itself by an empty one.

    Raises `LinkError`, and ``OSError`` where there is none.
    """
    descriptor = open_folder(root, "")
    try:
        for name in folder.split("/") if folder else ():
            outer, descriptor = descriptor, open_folder(descriptor, name)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def make_root(root: str) -> None:
    """Make a store's root, which may lie behind links, and its parents; with durable entries."""
    pending: list[str] = []
    while not os.path.isdir(root):
        pending.append(root)
        root = os.path.dirname(root)
    for each in reversed(pending):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each)
        with opened_folder(os.path.dirname(each), "") as opened:
            sync_folder(opened)


def open_file(folder: int, name: str) -> int:
    """Descriptor of a file, to read it.

    Raises `LinkError`, and ``IsADirectoryError`` for all else that is no regular file.
    """
    with _links_refused(folder, name):
        descriptor = os.open(name, _FILE, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "is no regular file", name)
    return descriptor


def status(folder: int, name: str) -> os.stat_result:
    """What `name` itself is: of a link, not what it leads to."""
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def sync_folder(folder: int) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(".", _LISTED, dir_fd=folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(root: str, folder: str) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder; none where there is no such folder. Raises `LinkError`."""
    try:
        with opened_folder(root, folder) as opened:
            listed = os.open(".", _LISTED, dir_fd=opened)
    except LinkError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(listed) as found:
            yield from found
    finally:
        os.close(listed)


@contextlib.contextmanager
def _links_refused(folder: int, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(folder, name):
            raise LinkError(errno.ELOOP, "is a symbolic link", name) from error
        raise


def _is_link(folder: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(status(folder, name).st_mode)
    except OSError:  # gone since; then the first error says what is the matter
        return False
