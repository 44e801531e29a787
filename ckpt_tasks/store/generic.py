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

__all__ = ["FsspecStore", "modified_time"]

_PIECE_BYTES = 16 * 1024 * 1024
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
        self._fs = filesystem
        self._root = root.rstrip("/")
        self.url = url.rstrip("/")

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            if limit is not None and (size := self._file_size(full)) > limit:
                raise CorruptCheckpointError(
                    f"{self._shown(path)} has {size} bytes, more than the {limit} it may have"
                )
            return bytes(self._fs.cat_file(full))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        full = self._full(path)
        with self._errors("read", path):
            size = self._file_size(full)
            # Some file systems answer a range of no bytes with the whole object, or an error.
            data = self._fs.cat_file(full, start=start, end=stop) if start < stop <= size else b""
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
            self._pipe(full, data)

    def put(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            self._pipe(self._full(path), data)

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
                with self._fs.open(full, "wb") as file:
                    for part in parts:
                        _write_in_pieces(file, part)
                self._confirm_size(path, size)
            except BaseException:
                with contextlib.suppress(Exception):  # the error under way says more
                    self._fs.rm_file(full)
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
            self._fs.rm_file(full)

    def _full(self, path: str) -> str:
        try:
            return f"{self._root}/{check_relative(path)}"
        except ValueError as error:
            raise ConfigError(f"{error}; the store {self.url} does not open it") from error

    def _folder(self, prefix: str) -> str:
        return self._full(prefix.removesuffix("/")) if prefix else self._root

    def _shown(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _pipe(self, full: str, data: bytes) -> None:
        self._make_parent(full)
        self._fs.pipe_file(full, data)

    def _make_parent(self, full: str) -> None:
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)

    def _stands(self, full: str) -> bool:
        # Not `exists`, which calls an error an absence in most file systems.
        try:
            self._file_size(full)
        except _NO_OBJECT:
            return False
        return True

    def _file_size(self, full: str) -> int:
        info = self._fs.info(full)
        if info["type"] != "file":
            raise FileNotFoundError(full)
        return int(info["size"])

    def _confirm_size(self, path: str, size: int) -> None:
        stored = self._file_size(self._full(path))
        if stored != size:
            raise StoreError(f"{self._shown(path)} has {stored} bytes after writing {size}")

    def _children(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and details of each entry of a folder, without hidden ones."""
        try:
            entries = self._fs.ls(folder := self._folder(prefix), detail=True)
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


def _write_in_pieces(file: Any, part: Any) -> None:
    """A buffered file takes a copy of all that it is given at once."""
    view = memoryview(part).cast("B")
    for start in range(0, view.nbytes, _PIECE_BYTES):
        file.write(view[start : start + _PIECE_BYTES])
