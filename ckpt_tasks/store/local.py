"""A store on a local or mounted POSIX file system.

Objects become visible whole: a small one is written under a hidden name and then linked or
renamed, both atomic. Data is written under its final name, which holds a write-id and means
nothing until a commit record names it; so what a killed writer leaves is found by its name and
can be collected. Everything is durable (file, its directory entry, and the entries of new
directories) when a method returns. Nothing below the root is reached through a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ckpt_tasks.errors import (
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from ckpt_tasks.format.layout import check_relative
from ckpt_tasks.store._beneath import (
    LinkError,
    entries,
    make_root,
    open_file,
    open_folder,
    opened_folder,
    status,
    sync_folder,
)
from ckpt_tasks.store._direct import direct_source, read_direct, write_direct
from ckpt_tasks.store._posix import publish_exclusively, write_all
from ckpt_tasks.store._trouble import store_error
from ckpt_tasks.store.base import ObjectInfo, Store, UploadInfo

__all__ = ["LocalStore"]

_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TEMPORARY = ".tmp-"  # begins the names of files that are not whole yet
_MAX_DEPTH = 64
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
    is_mounted = True

    def __init__(self, root: str) -> None:
        if not os.path.isabs(root):
            raise ConfigError(f"the store's path {root!r} is not absolute")
        self._root = os.path.normpath(root)
        self._durable: set[str] = set()
        self._has_root = False  # it has been there
        self.url = f"file://{self._root}"

    @property
    def root(self) -> str:
        """The directory."""
        return self._root

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        with self._errors("read", path), self._opened(path) as (descriptor, size):
            if limit is not None and size > limit:
                raise CorruptCheckpointError(
                    f"{self._full(path)} has {size} bytes, more than the {limit} it may have"
                )
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.readall()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._errors("read", path), self._opened(path) as (descriptor, size):
            if size >= stop:
                data = _read_exactly(descriptor, start, stop)
                if len(data) == stop - start:
                    return data
            raise self._ends_early(path, size, start, stop)

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        with self._errors("read", path), self._opened(path) as (descriptor, _):
            count = read_direct(descriptor, start, buffer)
        if start + count < stop:
            raise self._ends_early(path, start + count, start, stop)

    def map(self, path: str) -> memoryview | None:
        with self._errors("read", path), self._opened(path) as (descriptor, size):
            if size == 0:
                return memoryview(bytearray())
            return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY))

    def create(self, path: str, data: bytes) -> None:
        folder, name = self._parts(path)
        with (
            self._errors("create", path, needed=len(data)),
            self._temporary(folder, [data]) as (opened, temporary),
        ):
            try:
                publish_exclusively(opened, temporary, name)
            finally:
                # Also where another has the name: its creator may have died before this, and
                # who finds the object relies on it.
                sync_folder(opened)

    def put(self, path: str, data: bytes) -> None:
        folder, name = self._parts(path)
        with (
            self._errors("write", path, needed=len(data)),
            self._temporary(folder, [data]) as (opened, temporary),
        ):
            os.rename(temporary, name, src_dir_fd=opened, dst_dir_fd=opened)
            sync_folder(opened)

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        folder, name = self._parts(path)
        with (
            self._errors("write", path, needed=size),
            self._new_file(folder, name) as (opened, descriptor),
        ):
            source = direct_source(parts, size)
            if source is None or not write_direct(descriptor, source, size):
                write_all(descriptor, parts)
            os.fsync(descriptor)
            written = os.fstat(descriptor).st_size
            if written != size:
                raise StoreError(f"{self._full(path)} has {written} bytes after writing {size}")
            sync_folder(opened)

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        folder, name = self._parts(path)
        with (
            self._errors("write", path, needed=size),
            self._temporary(folder, parts) as (opened, temporary),
        ):
            written = status(opened, temporary).st_size
            if written != size:
                raise StoreError(f"{self._full(path)} would have {written} bytes instead of {size}")
            os.rename(temporary, name, src_dir_fd=opened, dst_dir_fd=opened)
            sync_folder(opened)

    def exists(self, path: str) -> bool:
        try:
            mode = self._status(path).st_mode
        except ObjectNotFoundError:
            return False
        # A link is no object, but its name is taken: who asks before a create must not go on.
        return stat.S_ISREG(mode) or stat.S_ISLNK(mode)

    def size(self, path: str) -> int:
        found = self._status(path)
        with self._errors("read", path):
            if stat.S_ISLNK(found.st_mode):
                raise LinkError(errno.ELOOP, "is a symbolic link", path)
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, "is no regular file", path)
            return found.st_size

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        with self._errors("list", prefix):
            return sorted(self._walk(prefix))

    def list_folders(self, prefix: str) -> list[str]:
        with self._errors("list", prefix):
            return sorted(
                entry.name
                for entry in entries(self._root, self._folder(prefix))
                if entry.is_dir(follow_symlinks=False)
                and not entry.name.startswith(".")
                and any(self._walk(f"{prefix}{entry.name}/"))
            )

    def delete(self, path: str) -> None:
        folder, name = self._parts(path)
        with self._errors("delete", path):
            try:
                with opened_folder(self._root, folder) as opened:
                    os.unlink(name, dir_fd=opened)
                    # Else a crash could bring it back after what it referred to is gone.
                    sync_folder(opened)
            except LinkError:
                raise
            except (FileNotFoundError, NotADirectoryError):
                return
        if folder:
            outer, _, inner = folder.rpartition("/")
            # Not empty, as a rule; or another process has removed it.
            with contextlib.suppress(OSError), opened_folder(self._root, outer) as opened:
                os.rmdir(inner, dir_fd=opened)

    def list_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        with self._errors("list", prefix):
            now, found = time.time(), sorted(self._temporaries(prefix))
        return [upload for upload in found if now - upload.begun >= older_than]

    def abort_uploads(
        self,
        prefix: str,
        older_than: float,
        *,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> list[UploadInfo]:
        with self._errors("list", prefix):
            found = sorted(one for one in self._temporaries(prefix) if chosen(one.path))
            now = self._now() if found else 0.0
        old = [upload for upload in found if now - upload.begun >= older_than]
        for upload in old:
            self.delete(upload.path)
        return old

    def check_writable(self) -> None:
        """Make the root and a file in it; raises `ConfigError` where that is not allowed."""
        try:
            with self._temporary("", [b"x"]):
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
        with self._temporary("", [b"x"]) as (opened, temporary):
            return status(opened, temporary).st_mtime

    def _ends_early(self, path: str, size: int, start: int, stop: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._full(path)} ends after {size} bytes; bytes {start} to {stop} were asked for"
        )

    def _folder(self, prefix: str) -> str:
        """A folder's path relative to the root, checked; empty for the root itself."""
        folder = prefix.removesuffix("/")
        if prefix:
            self._full(folder)
        return folder

    def _parts(self, path: str) -> tuple[str, str]:
        """The folder of an object, relative to the root, and its name there; checked."""
        self._full(path)
        folder, _, name = path.rpartition("/")
        return folder, name

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, int]]:
        """Descriptor and size of an object, to read it."""
        folder, name = self._parts(path)
        with opened_folder(self._root, folder) as opened:
            descriptor = open_file(opened, name)
        try:
            yield descriptor, os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _status(self, path: str) -> os.stat_result:
        folder, name = self._parts(path)
        with self._errors("read", path), opened_folder(self._root, folder) as opened:
            return status(opened, name)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below a folder."""
        for path, found in self._files(prefix, hidden=False):
            yield ObjectInfo(path, found.st_size, found.st_mtime)

    def _temporaries(self, prefix: str) -> Iterator[UploadInfo]:
        """Files below a folder that are not whole yet, or never will be."""
        for path, found in self._files(prefix, hidden=True):
            if path.rpartition("/")[2].startswith(_TEMPORARY):
                yield UploadInfo(path, found.st_mtime)

    def _files(self, prefix: str, *, hidden: bool) -> Iterator[tuple[str, os.stat_result]]:
        """Regular files below a folder whose names are, or are not, hidden. Links are none, nor is
        what lies behind them.
        """
        pending = [prefix]
        while pending:
            prefix = pending.pop()
            if prefix.count("/") > _MAX_DEPTH:
                raise ConfigError(
                    f"folders in the store {self._root} are nested more than {_MAX_DEPTH} deep, "
                    f"which it does not make: {prefix[:99]}...; remove them"
                )
            for entry in entries(self._root, self._folder(prefix)):
                is_hidden = entry.name.startswith(".")
                if entry.is_dir(follow_symlinks=False):
                    pending += [] if is_hidden else [f"{prefix}{entry.name}/"]
                elif is_hidden == hidden and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        yield prefix + entry.name, entry.stat(follow_symlinks=False)

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str, *, needed: int = 0) -> Iterator[None]:
        full = os.path.join(self._root, path)
        try:
            yield
        except StoreError:
            raise
        except FileExistsError as error:
            raise ObjectExistsError(f"{full} exists already") from error
        except LinkError as error:
            kind = CorruptCheckpointError if verb == "read" else ConfigError
            raise kind(
                f"cannot {verb} {full}: {error.filename} is a symbolic link, and no link below the "
                f"store {self._root} is followed; put what it leads to in its place"
            ) from error
        except OSError as error:
            if verb == "read" and isinstance(error, _NO_OBJECT):
                raise ObjectNotFoundError(f"there is no object {full}") from error
            raise store_error(error, verb, full, needed=needed, root=self._root) from error

    @contextlib.contextmanager
    def _temporary(self, folder: str, parts: Iterable[Any]) -> Iterator[tuple[int, str]]:
        """A folder's descriptor, and the hidden name in it of a durable file of `parts`, which is
        removed at the end.
        """
        name = f"{_TEMPORARY}{uuid.uuid4().hex}"
        opened, descriptor = self._open_new(folder, name)
        try:
            try:
                write_all(descriptor, parts)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield opened, name
        finally:
            with contextlib.suppress(OSError):  # renamed; or harmless, as it is never listed
                os.unlink(name, dir_fd=opened)
            os.close(opened)

    @contextlib.contextmanager
    def _new_file(self, folder: str, name: str) -> Iterator[tuple[int, int]]:
        """Descriptors of a folder and of a file in it that did not exist; the file is removed if
        the block raises.
        """
        opened, descriptor = self._open_new(folder, name)
        try:
            try:
                yield opened, descriptor
            finally:
                os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the error under way says more
                os.unlink(name, dir_fd=opened)
            raise
        finally:
            os.close(opened)

    def _open_new(self, folder: str, name: str) -> tuple[int, int]:
        """Descriptors of a folder, made where there is none, and of a new file in it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for _ in range(_FOLDER_TRIES):
            try:
                opened = self._make_folder(folder)
            except FileNotFoundError:
                self._durable.clear()
                continue
            try:
                return opened, os.open(name, flags, 0o666, dir_fd=opened)
            except FileNotFoundError:
                os.close(opened)
                self._durable.clear()
            except BaseException:
                os.close(opened)
                raise
        raise StoreError(f"the folder of {folder}/{name} is removed each time it is made")

    def _make_folder(self, folder: str) -> int:
        """Descriptor of a folder, made with its parents where they are missing; all have durable
        entries.

        Parents are remembered. The folder itself is not: another process may have removed it
        while it was empty, and one may have made it anew but not yet have made that durable.
        """
        self._check_root()
        make_root(self._root)
        self._has_root = True
        opened = open_folder(self._root, "")
        try:
            reached = ""
            for name in folder.split("/") if folder else ():
                reached = f"{reached}{name}/"
                is_parent = len(reached) <= len(folder)
                if not (is_parent and reached in self._durable):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=opened)
                    sync_folder(opened)
                outer, opened = opened, open_folder(opened, name)
                os.close(outer)
                if is_parent:
                    self._durable.add(reached)
        except BaseException:
            os.close(opened)
            raise
        return opened

    def _check_root(self) -> None:
        """A root that has been there and is gone is not made again: it belongs to a file system
        that was unmounted, and another one would hide what is written, or be hidden.
        """
        # In this order: another thread may be making it.
        if self._has_root and not os.path.isdir(self._root):
            raise StoreError(
                f"the store {self._root} is gone: its file system was unmounted, or somebody "
                "has removed it. Mount it again; nothing is written meanwhile"
            )


def _read_exactly(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop`, or fewer at the end of the file."""
    data = os.pread(descriptor, stop - start, start)
    if len(data) in (0, stop - start):
        return data
    return data + _read_exactly(descriptor, start + len(data), stop)
