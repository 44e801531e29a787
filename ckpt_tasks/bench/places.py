"""Where peers write: files of a local folder, or objects through fsspec."""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ckpt_tasks.config import StoreConfig

__all__ = ["FsspecPlace", "LocalPlace", "Place"]


class Place(ABC):
    """A folder for what peers write, on the storage that is measured.

    Attributes
    ----------
    suffix
        What a peer's save here ends with, for its name.
    """

    suffix = ""

    @abstractmethod
    def write(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A new file to write to; durable when the context ends."""

    @abstractmethod
    def read(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """The file `name`, to read from."""

    @abstractmethod
    def dcp_writer(self, name: str) -> Any:
        """DCP's own, for a folder `name`."""

    @abstractmethod
    def dcp_reader(self, name: str) -> Any:
        """DCP's own."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the file or folder; no error if there is none."""

    def drop_cache(self, name: str) -> None:  # noqa: B027 - what is remote is not cached here
        """Have the next read come from the storage, as after a restart elsewhere."""


class LocalPlace(Place):
    """A local folder."""

    suffix = " + fsync"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        with (self._folder / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> BinaryIO:
        return (self._folder / name).open("rb")

    def path(self, name: str) -> Path:
        return self._folder / name

    def sync(self, name: str) -> None:
        """Make a file durable that a library has written."""
        with self.read(name) as file:
            os.fsync(file.fileno())

    def dcp_writer(self, name: str) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        return FileSystemWriter(self._folder / name, sync_files=True, overwrite=True)

    def dcp_reader(self, name: str) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        return FileSystemReader(self._folder / name)

    def remove(self, name: str) -> None:
        path = self._folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def drop_cache(self, name: str) -> None:
        path = self._folder / name
        for file in path.iterdir() if path.is_dir() else [path]:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class FsspecPlace(Place):
    """A folder on any storage that fsspec opens, as people open it: with its defaults.

    Parameters
    ----------
    config
        The store below which it lies.
    """

    def __init__(self, config: StoreConfig, folder: str) -> None:
        import fsspec

        self._options = _options(config)
        self._url = f"{config.url.rstrip('/')}/{folder}"
        self._fs, self._root = fsspec.url_to_fs(self._url, **self._options)

    def write(self, name: str) -> contextlib.AbstractContextManager[Any]:
        opened: contextlib.AbstractContextManager[Any] = self._fs.open(self._path(name), "wb")
        return opened

    def read(self, name: str) -> contextlib.AbstractContextManager[Any]:
        opened: contextlib.AbstractContextManager[Any] = self._fs.open(self._path(name), "rb")
        return opened

    def dcp_writer(self, name: str) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(f"{self._url}/{name}", overwrite=True, **self._options)

    def dcp_reader(self, name: str) -> Any:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(f"{self._url}/{name}", **self._options)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


def _options(config: StoreConfig) -> dict[str, Any]:
    """A store's options as fsspec takes them: botocore's client gets the region."""
    options: dict[str, Any] = dict(config.options)
    if "region_name" in options:
        options["client_kwargs"] = {"region_name": options.pop("region_name")}
    return options
