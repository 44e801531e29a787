"""The contract of a store: named immutable objects, a conditional create, an honest listing.

Paths are relative to the store's root, ``/``-separated, as `ckpt_tasks.format.layout` spells
them. Every method either does what it says or raises; nothing degrades silently.

Raises
------
StoreError
    From any method: storage failed, or did not answer in the time that `deadline` allows. After
    it, a `create`, `put` or `write` may or may not have taken effect, or may still do so;
    `create_once` finds out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import msgspec

__all__ = ["ObjectInfo", "Store", "UploadInfo"]


class ObjectInfo(msgspec.Struct, frozen=True, order=True):
    """One object of a listing.

    Parameters
    ----------
    path
        Relative to the store's root.
    size
        Bytes.
    modified
        When it was last written, in seconds since the epoch by the **store's** clock, or
        ``None`` where the store does not tell.
    """

    path: str
    size: int
    modified: float | None = None


class UploadInfo(msgspec.Struct, frozen=True, order=True):
    """A `Store.write` that was begun and not ended, of which the store keeps what had arrived.

    Parameters
    ----------
    path
        What it was to make, relative to the store's root.
    begun
        When, or when it was last written to, in seconds since the epoch by the **store's** clock.
    """

    path: str
    begun: float


class Store(ABC):
    """A root that holds runs. Thread-safe; not shared between processes: reopen by `url`.

    Attributes
    ----------
    url
        The root, with userinfo masked: safe to print, log and record.
    supports_conditional_create
        Whether `create` is atomic among all writers, in this and other processes and hosts.
        Where it is not, `checkpointer` refuses to write unless the store was declared
        single-writer.
    is_shared
        Whether another process that opens `url` finds the same objects.
    is_mounted
        Whether it lies on a file system that may be unmounted beside this program, which leaves
        an empty folder in its place.
    """

    url: str
    supports_conditional_create: bool
    is_shared: bool = True
    is_mounted: bool = False

    @abstractmethod
    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """The whole object. Raises `ObjectNotFoundError`, or `CorruptCheckpointError` when it
        is larger than `limit` bytes (checked before memory is taken).
        """

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` (exclusive). Raises `ObjectNotFoundError`, or
        `CorruptCheckpointError` when the object ends before `stop`.
        """

    def read_into(self, path: str, start: int, stop: int, buffer: memoryview) -> None:
        """Bytes `start` to `stop` (exclusive) into the beginning of `buffer`.

        What lies behind them in `buffer` may be overwritten: whole pages can be read faster.
        Raises as `read_range`.
        """
        buffer[: stop - start] = self.read_range(path, start, stop)

    def map(self, path: str) -> memoryview | None:
        """The whole object as memory that takes none before it is looked at, or ``None`` where
        the store has no such thing.

        What is written to that memory stays in it. Raises `ObjectNotFoundError`.
        """
        return None

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Make a small object durable, whole, and only if there is none at `path`.

        Raises `ObjectExistsError` if there is one; exactly one of many concurrent callers does
        not. Nobody ever sees part of it. Never a multipart upload.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write or overwrite a small object, atomically for readers. For heartbeats."""

    @abstractmethod
    def write(self, path: str, parts: Iterable[Any], size: int) -> None:
        """Write a new data object from bytes-like `parts` that add up to `size`.

        Durable, and its size confirmed by the store, when this returns. Raises
        `ObjectExistsError` if there is one already (paths contain a write-id, so there never
        is), and leaves nothing behind where it can when it fails.

        The memory of `parts` must stay as it is until this returns: it is sent from where it
        lies, perhaps twice.
        """

    @abstractmethod
    def replace(self, path: str, parts: Iterable[Any], size: int) -> None:
        """Write a data object as `write` does, in the place of one that may be there.

        Nobody ever sees part of it, and a kill leaves what was there before: for those who write
        bytes under a name that others may be writing the same bytes under.
        """

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is an object at `path` **now**: one request, never from a cache."""

    @abstractmethod
    def size(self, path: str) -> int:
        """The object's size in bytes. Raises `ObjectNotFoundError`."""

    @abstractmethod
    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose path starts with `prefix`, recursively, sorted by path; uncached.

        `prefix` is empty or ends with ``/``. Empty list where there is nothing. Temporary
        names of writes under way are not listed.
        """

    @abstractmethod
    def list_folders(self, prefix: str) -> list[str]:
        """Names of the direct subfolders of `prefix` that hold an object, sorted; uncached."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; no error if there is none."""

    def list_uploads(self, prefix: str, older_than: float) -> list[UploadInfo]:
        """What `abort_uploads` would remove; arguments and errors as there.

        Where the store's own clock is known by writing to it only, ages are by this machine's.
        """
        return []

    def abort_uploads(
        self,
        prefix: str,
        older_than: float,
        *,
        chosen: Callable[[str], bool] = lambda path: True,
    ) -> list[UploadInfo]:
        """Remove what writes below `prefix` left that a killed process had begun.

        Stores that take objects in parts keep, and charge for, the parts of an upload that was
        never completed; file systems keep temporary files. Neither appears in a listing.

        Parameters
        ----------
        prefix
            As for `list_objects`.
        older_than
            Seconds since the upload was begun, by the store's clock. Must exceed the longest
            write: one that is still under way fails when it is aborted.
        chosen
            Given an upload's path; those for which it is false stay.

        Returns
        -------
        list of UploadInfo
            What was removed, sorted; always empty where a killed write leaves no such thing.
        """
        return []

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Release connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
