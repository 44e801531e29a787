"""Any file system that fsspec opens, by its generic operations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from ckpt_tasks.errors import (
    CkptTasksError,
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from ckpt_tasks.format.layout import check_relative
from ckpt_tasks.masking import mask_text
from ckpt_tasks.store.base import ObjectInfo, Store
from ckpt_tasks.store.filesystem import BoundedFileSystem

__all__ = ["FsspecStore", "modified_time"]

_LIST_BYTES = 4 * 1024 * 1024  # in the time for which hundreds of thousands of names arrive
_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


class FsspecStore(Store):
    """Objects are files of an fsspec file system, below one of its folders.

    fsspec's generic exclusive create checks first and writes then, so it is not atomic:
    `supports_conditional_create` is False, and only a store declared single-writer is written.

    Parameters
    ----------
    filesystem
        An `fsspec.AbstractFileSystem` opened with ``use_listings_cache=False``.
    root
        The folder, as the file system spells it (without protocol).
    url
        The root for people, without userinfo.
    """

    supports_conditional_create = False

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._files = self._bounded(filesystem)
        self._root = root.rstrip("/")
        self.url = url.rstrip("/")

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            size = self._file_size(full)
            if limit is not None and size > limit:
                raise CorruptCheckpointError(
                    f"{self._shown(path)} has {size} bytes, more than the {limit} it may have"
                )
            return bytes(self._files.call("cat_file", full, size=size))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            size = self._file_size(full)
            data = b""
            # Some file systems answer a range of no bytes with the whole object, or an error.
            if start < stop <= size:
                data = self._files.call("cat_file", full, start=start, end=stop, size=stop - start)
        if len(data) != stop - start or stop > size:
            raise CorruptCheckpointError(
                f"{self._shown(path)} ends after {size} bytes; bytes {start} to {stop} were asked "
                "for"
            )
        return bytes(data)

    def create(self, path: str, data: bytes) -> None:
        full = self._full(path)
        with self._errors("create", path):
            if self._stands(full):
                raise FileExistsError(full)
            self._make_parent(full)
            # Not tried again: who must know whose object stands asks `create_once`, which does so.
            self._files.call_once("pipe_file", full, data, size=len(data))

    def put(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            full = self._full(path)
            self._make_parent(full)
            self._files.call("pipe_file", full, data, size=len(data))

    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        full = self._full(path)
        with self._errors("write", path):
            if self._stands(full):
                raise FileExistsError(full)
        self.replace(path, parts, size)

    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        """As `Store.replace`, but whole for others only as far as the file system makes a file
        visible when it is closed, as object stores do.
        """
        full = self._full(path)
        with self._errors("write", path):
            self._make_parent(full)
            try:
                with self._files.open_to_write(full) as file:
                    for part in parts:
                        file.write(part)
                self._confirm_size(path, size)
            except BaseException:
                with contextlib.suppress(Exception):  # the error under way says more
                    self._files.call("rm_file", full)
                raise

    def exists(self, path: str) -> bool:
        with self._errors("read", path):
            return self._stands(self._full(path))

    def size(self, path: str) -> int:
        with self._errors("read", path):
            return self._file_size(self._full(path))

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        with self._errors("list", prefix):
            return sorted(self._walk(prefix))

    def list_folders(self, prefix: str) -> list[str]:
        with self._errors("list", prefix):
            return sorted(
                name
                for name, info in self._children(prefix)
                if info["type"] == "directory" and self._holds_object(f"{prefix}{name}/")
            )

    def delete(self, path: str) -> None:
        full = self._full(path)
        with self._errors("delete", path), contextlib.suppress(*_NO_OBJECT):
            self._files.call("rm_file", full)

    def _full(self, path: str) -> str:
        try:
            return f"{self._root}/{check_relative(path)}"
        except ValueError as error:
            raise ConfigError(f"{error}; the store {self.url} does not open it") from error

    def _folder(self, prefix: str) -> str:
        return self._full(prefix.removesuffix("/")) if prefix else self._root

    def _shown(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _bounded(self, filesystem: Any) -> BoundedFileSystem:
        return BoundedFileSystem(filesystem)

    def _make_parent(self, full: str) -> None:
        self._files.call("makedirs", full.rpartition("/")[0], exist_ok=True)

    def _stands(self, full: str) -> bool:
        # Not `exists`, which calls an error an absence in most file systems.
        try:
            self._file_size(full)
        except _NO_OBJECT:
            return False
        return True

    def _file_size(self, full: str) -> int:
        info = self._files.call("info", full)
        if info["type"] != "file":
            raise FileNotFoundError(full)
        return int(info["size"])

    def _confirm_size(self, path: str, size: int) -> None:
        stored = self._file_size(self._full(path))
        if stored != size:
            raise StoreError(f"{self._shown(path)} has {stored} bytes after writing {size}")

    def _list(self, method: str, folder: str) -> Any:
        return self._files.call(method, folder, detail=True, size=_LIST_BYTES)

    def _children(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and details of each entry of a folder, without hidden ones."""
        try:
            entries = self._list("ls", folder := self._folder(prefix))
        except _NO_OBJECT:
            return
        for info in entries:
            full = info["name"].strip("/")
            name = full.rpartition("/")[2]
            # Listing an object shows the object itself.
            if name and not name.startswith(".") and full != folder.strip("/"):
                yield name, info

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        for name, info in self._children(prefix):
            if info["type"] == "directory":
                yield from self._walk(f"{prefix}{name}/")
            else:
                yield ObjectInfo(prefix + name, int(info["size"]), modified_time(info))

    def _holds_object(self, prefix: str) -> bool:
        return any(self._walk(prefix))

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str) -> Iterator[None]:
        """Turn whatever the file system raises into this package's errors.

        Its client library is not known here, so every other exception is a failure of storage.
        """
        try:
            yield
        except CkptTasksError:
            raise
        except FileExistsError as error:
            raise ObjectExistsError(f"{self._shown(path)} exists already") from error
        except Exception as error:
            if verb == "read" and isinstance(error, _NO_OBJECT):
                raise ObjectNotFoundError(f"there is no object {self._shown(path)}") from error
            raise self._failure(verb, path, error) from error

    def _failure(self, verb: str, path: str, error: Exception) -> CkptTasksError:
        said = mask_text(f"{type(error).__name__}: {error}")
        return StoreError(f"cannot {verb} {self._shown(path)}: {said}")


def modified_time(info: dict[str, Any]) -> float | None:
    """When an object was written, from what a file system tells about it; seconds since 1970."""
    for key in _MODIFIED:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return None
