"""Object stores whose fsspec file system has a conditional create.

``pipe_file(mode="create")`` is one conditional request, atomic at the server, in s3fs
(``If-None-Match: *``), gcsfs (``ifGenerationMatch=0``) and adlfs (``If-None-Match: *``), of 2026:
``tests/contract/test_store_clouds.py`` runs all three against servers that honour it. fsspec's own
default is check-then-write, which is what `FsspecStore` is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.store.base import ObjectInfo
from ckpt_tasks.store.generic import FsspecStore, modified_time
from ckpt_tasks.store.retry import http_status

__all__ = ["CONDITIONAL_PROTOCOLS", "MAX_CREATE_BYTES", "ObjectStore"]

CONDITIONAL_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})

MAX_CREATE_BYTES = 16 * 1024 * 1024
"""Far below the sizes from which the clients split an upload, which some servers then complete
without looking at the condition."""

_REQUESTS = 8  # at once


class ObjectStore(FsspecStore):
    """Objects of a bucket or container, below a prefix.

    Attributes
    ----------
    supports_conditional_create
        Set to False by `open_store` where a probe shows that the server ignores the condition;
        `create` then checks and writes, which only a single writer may rely on.
    """

    supports_conditional_create = True

    def create(self, path: str, data: bytes) -> None:
        if len(data) > MAX_CREATE_BYTES:
            raise ConfigError(
                f"{path} has {len(data)} bytes; an object of more than {MAX_CREATE_BYTES} cannot "
                "be created in one request"
            )
        if not self.supports_conditional_create:
            super().create(path, data)
            return
        with self._errors("create", path):
            self._pipe_exclusively(self._full(path), data)

    def _pipe_exclusively(self, full: str, data: bytes) -> None:
        """One conditional request; raises ``FileExistsError`` where the object stands."""
        try:
            # Not tried again, as in `FsspecStore.create`.
            self._files.call_once("pipe_file", full, data, mode="create", size=len(data))
        except Exception as error:
            status = http_status(error)
            # 409: a write to the same name is under way, and may yet fail.
            if status == 412 or (status == 409 and self._stands(full)):
                raise FileExistsError(full) from error
            raise

    def _make_parent(self, full: str) -> None:
        """Folders are only prefixes; making one would create a bucket."""

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """One flat listing instead of one per folder."""
        folder = self._folder(prefix)
        found = self._list("find", folder)
        if isinstance(found, list):  # adlfs names an object in place of what lies below it
            return
        for name, info in found.items():
            path = prefix + name.removeprefix(folder).lstrip("/")
            hidden = any(part.startswith(".") for part in path.split("/"))
            # Consoles mark folders by empty objects whose names end with a slash.
            if info["type"] == "file" and not hidden and not name.endswith("/") and name != folder:
                yield ObjectInfo(path, int(info["size"]), modified_time(info))

    def list_folders(self, prefix: str) -> list[str]:
        with self._errors("list", prefix):
            names = [name for name, info in self._children(prefix) if info["type"] == "directory"]
            # Some servers keep showing a folder whose last object is gone.
            with ThreadPoolExecutor(_REQUESTS) as pool:
                held = pool.map(lambda name: self._holds_object(f"{prefix}{name}/"), names)
                return sorted(name for name, holds in zip(names, held, strict=True) if holds)
