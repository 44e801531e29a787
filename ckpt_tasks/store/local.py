"""A store on a local or mounted POSIX file system.

Objects become visible whole: a small one is written under a hidden name and then linked or
renamed, both atomic. Data is written under its final name, which holds a write-id and means
nothing until a commit record names it; so what a killed writer leaves is found by its name and
can be collected. Everything is durable (file, its directory entry, and the entries of new
directories) when a method returns.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from ckpt_tasks.errors import (
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from ckpt_tasks.format.layout import check_relative
from ckpt_tasks.store._direct import direct_source, read_direct, write_direct
from ckpt_tasks.store._posix import (
    fsync_folder,
    no_space_message,
    publish_exclusively,
    write_all,
)
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo

__all__ = ["LocalStore"]

_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TEMPORARY = ".tmp-"  # begins the names of files that are not whole yet
_FOLDER_TRIES = 5  # a concurrent `delete` may remove the empty folder that was just made


class LocalStore(Store):
    """Objects are files below a directory.

    `create` is atomic among all processes that see the file system, by ``link(2)``; a file
    system with neither hard links nor ``renameat2(RENAME_NOREPLACE)`` is refused.

    Parameters
    ----------
    root
        Absolute path of the directory. Made on the first write.
    """

    supports_conditional_create = True

    def __init__(self, root: str) -> None:
        if not os.path.isabs(root):
            raise ConfigError(f"the store's path {root!r} is not absolute")
        self._root = os.path.normpath(root)
        self._durable: set[str] = set()
        self.url = f"file://{self._root}"

    @property
    def root(self) -> str:
        """The directory."""
        return self._root

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        with self._errors("read", path), open(self._full(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise CorruptCheckpointError(
                    f"{self._full(path)} has {size} bytes, more than the {limit} it may have"
                )
            return file.readall()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors("read", path), open(self._full(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size >= stop:
                data = _read_exactly(file.fileno(), start, stop)
                if len(data) == stop - start:
                    return data
            raise self._ends_early(path, size, start, stop)

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        with self._errors("read", path):
            count = read_direct(self._full(path), start, buffer)
        if start + count < stop:
            raise self._ends_early(path, start + count, start, stop)

    def map(self, path: str) -> memoryview | None:
        with self._errors("read", path), open(self._full(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return memoryview(bytearray())
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))

    def create(self, path: str, data: bytes) -> None:
        full = self._full(path)
        with self._errors("create", path, needed=len(data)):
            try:
                with self._temporary(full, [data]) as temporary:
                    publish_exclusively(temporary, full)
            except FileExistsError:
                # An earlier call may have died before this: who finds the object relies on it.
                fsync_folder(os.path.dirname(full))
                raise
            fsync_folder(os.path.dirname(full))

    def put(self, path: str, data: bytes) -> None:
        full = self._full(path)
        with self._errors("write", path, needed=len(data)):
            with self._temporary(full, [data]) as temporary:
                os.rename(temporary, full)
            fsync_folder(os.path.dirname(full))

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        full = self._full(path)
        with self._errors("write", path, needed=size):
            with self._new_file(full) as descriptor:
                source = direct_source(parts, size)
                if source is None or not write_direct(descriptor, source, size):
                    write_all(descriptor, parts)
                os.fsync(descriptor)
                written = os.fstat(descriptor).st_size
                if written != size:
                    raise StoreError(f"{full} has {written} bytes after writing {size}")
            fsync_folder(os.path.dirname(full))

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        full = self._full(path)
        with self._errors("write", path, needed=size):
            with self._temporary(full, parts) as temporary:
                written = os.path.getsize(temporary)
                if written != size:
                    raise StoreError(f"{full} would have {written} bytes instead of {size}")
                os.rename(temporary, full)
            fsync_folder(os.path.dirname(full))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except ObjectNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        full = self._full(path)
        with self._errors("read", path):
            status = os.stat(full)
            if not os.path.isfile(full):
                raise IsADirectoryError(errno.EISDIR, "is a directory", full)
            return status.st_size

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        with self._errors("list", prefix):
            return sorted(_walk(self._folder(prefix), prefix))

    def list_folders(self, prefix: str) -> list[str]:
        with self._errors("list", prefix):
            return sorted(
                entry.name
                for entry in _entries(self._folder(prefix))
                if entry.is_dir() and any(_walk(entry.path, ""))
            )

    def delete(self, path: str) -> None:
        full = self._full(path)
        folder = os.path.dirname(full)
        with self._errors("delete", path):
            try:
                os.unlink(full)
            except (FileNotFoundError, NotADirectoryError):
                return
            # Else a crash could bring it back after what it referred to is gone.
            try:
                fsync_folder(folder)
            except FileNotFoundError:  # it was empty, and another process has removed it
                fsync_folder(os.path.dirname(folder))
        if folder != self._root:
            with contextlib.suppress(OSError):  # not empty, as a rule
                os.rmdir(folder)

    def abort_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        with self._errors("list", prefix):
            found = sorted(_temporaries(self._folder(prefix), prefix))
            now = self._now() if found else 0.0
        old = [upload for upload in found if now - upload.begun > older_than]
        for upload in old:
            self.delete(upload.path)
        return old

    def check_writable(self) -> None:
        """Make the root and a file in it; raises `ConfigError` where that is not allowed."""
        try:
            with self._temporary(os.path.join(self._root, "x"), [b"x"]):
                pass
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"the store {self._root} cannot be written: {error.strerror} ({error.filename}); "
                "choose another place or give this user write permission"
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise ConfigError(
                    f"the store {self._root} lies on a read-only file system; choose another place"
                ) from error
            raise StoreError(f"cannot write to the store {self._root}: {error}") from error

    def _full(self, path: str) -> str:
        try:
            return os.path.join(self._root, check_relative(path))
        except ValueError as error:
            raise ConfigError(f"{error}; the store {self._root} does not open it") from error

    def _now(self) -> float:
        """By the clock of the file system, which may be another machine's."""
        with self._temporary(os.path.join(self._root, "x"), [b"x"]) as temporary:
            return os.stat(temporary).st_mtime

    def _ends_early(self, path: str, size: int, start: int, stop: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._full(path)} ends after {size} bytes; bytes {start} to {stop} were asked for"
        )

    def _folder(self, prefix: str) -> str:
        return self._full(prefix.removesuffix("/")) if prefix else self._root

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str, *, needed: int = 0) -> Iterator[None]:
        full = os.path.join(self._root, path)
        try:
            yield
        except StoreError:
            raise
        except FileExistsError as error:
            raise ObjectExistsError(f"{full} exists already") from error
        except OSError as error:
            if verb == "read" and isinstance(error, _NO_OBJECT):
                raise ObjectNotFoundError(f"there is no object {full}") from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(no_space_message(full, needed, self._root)) from error
            raise StoreError(f"cannot {verb} {full}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _temporary(self, full: str, parts: Iterable[Any]) -> Iterator[str]:
        """A durable file of `parts` beside `full`, under a hidden name; removed at the end."""
        folder = os.path.dirname(full)
        temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            descriptor = self._open_new(temporary)
            try:
                write_all(descriptor, parts)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield temporary
        finally:
            with contextlib.suppress(OSError):  # renamed; or harmless, as it is never listed
                os.unlink(temporary)

    @contextlib.contextmanager
    def _new_file(self, full: str) -> Iterator[int]:
        """Descriptor of a file that did not exist; removed if the block raises."""
        descriptor = self._open_new(full)
        try:
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the error under way says more
                os.unlink(full)
            raise

    def _open_new(self, full: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for _ in range(_FOLDER_TRIES):
            try:
                self._make_folder(os.path.dirname(full))
                return os.open(full, flags, 0o666)
            except FileNotFoundError:
                self._durable.clear()
        raise StoreError(f"the folder of {full} is removed each time it is made")

    def _make_folder(self, folder: str) -> None:
        """Make `folder` and its parents, with durable entries.

        Parents are remembered. The folder itself is not: another process may have removed it
        while it was empty, and one may have made it anew but not yet have made that durable.
        """
        if self._stands_above_root(folder):
            return
        pending = [folder]
        parent = os.path.dirname(folder)
        while parent not in self._durable and not self._stands_above_root(parent):
            pending.append(parent)
            parent = os.path.dirname(parent)
        for each in reversed(pending):
            with contextlib.suppress(FileExistsError):
                os.mkdir(each)
            fsync_folder(os.path.dirname(each))
        self._durable.update(pending[1:])

    def _stands_above_root(self, folder: str) -> bool:
        return len(folder) <= len(self._root) and os.path.isdir(folder)


def _read_exactly(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop`, or fewer at the end of the file."""
    data = os.pread(descriptor, stop - start, start)
    if len(data) in (0, stop - start):
        return data
    return data + _read_exactly(descriptor, start + len(data), stop)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Entries of a directory, without hidden ones: those are temporary or the store's own."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return


def _temporaries(folder: str, prefix: str) -> Iterator[UploadInfo]:
    """Files below a folder that are not whole yet, or never will be."""
    for parent, _, names in os.walk(folder):
        below = os.path.relpath(parent, folder)
        where = prefix if below == "." else f"{prefix}{below}/"
        for name in names:
            if name.startswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError):  # has become whole since
                    written = os.stat(os.path.join(parent, name)).st_mtime
                    yield UploadInfo(where + name, written)


def _walk(folder: str, prefix: str) -> Iterator[ObjectInfo]:
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file():
            with contextlib.suppress(FileNotFoundError):  # deleted since
                status = entry.stat()
                yield ObjectInfo(prefix + entry.name, status.st_size, status.st_mtime)
