"""fsspec's file systems, with an end to every operation and further tries of what may be repeated.

Their client libraries wait as they like: gcsfs has no time-out at all, adlfs none for an answer
that comes a byte at a time, paramiko none for a server that accepts and is silent.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ckpt_tasks.store.deadline import NoAnswerError, seconds_for, within
from ckpt_tasks.store.retry import is_transient, retry

__all__ = ["BoundedFile", "BoundedFileSystem", "DirectFileSystem"]

_CONNECTIONS = 4  # at once; so many ranges does a load read
_TRYING = 1.5  # deadlines, after which no further try begins
_PIECE_BYTES = 16 * 1024 * 1024


class BoundedFileSystem:
    """An fsspec file system, of which each operation ends.

    What is asked of an asynchronous file system is cancelled at its deadline. A synchronous one
    cannot be interrupted: its operation is given up in its thread, with the connection that it
    holds, and the next one gets a file system of its own.

    How long all takes: a try ends at its deadline, and none begins after one and a half of those.
    So a silent store is asked twice, and two and a half deadlines are the most: four minutes for
    what moves no bytes. The client's own tries lie within one of these: gcsfs asks a server that
    is busy six times in half a minute, which comes to five rounds here; azure's SDK waits 18, 24
    and 42 seconds before its further tries, and its fourth is begun in the first round.

    Parameters
    ----------
    filesystem
        An `fsspec.AbstractFileSystem`.
    """

    def __init__(self, filesystem: Any) -> None:
        self._fs: Any = filesystem
        self._make = type(filesystem), filesystem.storage_args, filesystem.storage_options

    def call(self, method: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        """An operation that may be repeated.

        Parameters
        ----------
        method
            Of the file system.
        size
            Bytes that it moves.

        Raises
        ------
        NoAnswerError
            It did not end in time; it may still take effect.
        Exception
            Whatever else the file system raises.
        """

        def act() -> Any:
            return self.call_once(method, *args, size=size, **kwargs)

        return retry(act, is_transient, seconds=_TRYING * seconds_for(size, _CONNECTIONS))

    def call_once(self, method: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        """As `call`, without further tries."""
        fs, seconds = self._fs, seconds_for(size, _CONNECTIONS)
        if not _is_asynchronous(fs, method):
            return self.within(seconds, lambda: getattr(self._opened(), method)(*args, **kwargs))

        from fsspec.asyn import sync  # only here: it takes a tenth of a second
        from fsspec.exceptions import FSTimeoutError

        try:
            return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=seconds, **kwargs)
        except FSTimeoutError as error:
            raise NoAnswerError(seconds) from error

    @contextlib.contextmanager
    def open_to_write(self, path: str) -> Iterator[BoundedFile]:
        """A new file, closed however this ends."""
        file = BoundedFile(self, self.call_once("open", path, "wb"))
        try:
            yield file
        except BaseException:
            with contextlib.suppress(Exception):  # the error under way says more
                file.close()
            raise
        file.close()

    def within(self, seconds: float, act: Callable[[], Any]) -> Any:
        """What `act` returns, in time; after it was given up, its file system is left to it."""
        fs = self._fs
        try:
            return within(seconds, act)
        except NoAnswerError:
            if self._fs is fs and not getattr(fs, "async_impl", False):
                self._fs = None
            raise

    def _opened(self) -> Any:
        fs = self._fs
        if fs is None:
            kind, arguments, options = self._make
            fs = self._fs = kind(*arguments, **options, skip_instance_cache=True)
        return fs


class DirectFileSystem(BoundedFileSystem):
    """One whose operations end by themselves."""

    def call(self, method: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        return getattr(self._fs, method)(*args, **kwargs)

    call_once = call

    def within(self, seconds: float, act: Callable[[], Any]) -> Any:
        return act()


class BoundedFile:
    """A file that is being written, of which each step ends.

    Parameters
    ----------
    files
        Where it lies.
    file
        As ``open`` of an fsspec file system gives it.
    """

    def __init__(self, files: BoundedFileSystem, file: Any) -> None:
        self._files = files
        self._file = file

    def write(self, part: Any) -> None:
        """Append bytes.

        Copies them: a write that was given up goes on, while their memory is used for others.
        """
        view = memoryview(part).cast("B")
        for start in range(0, view.nbytes, _PIECE_BYTES):
            piece = bytes(view[start : start + _PIECE_BYTES])
            self._do(len(piece), partial(self._file.write, piece))

    def close(self) -> None:
        """Make it visible for others, with what was written so far."""
        if self._file is not None:
            # What it holds back until then: adlfs a block of 50 MiB.
            held = getattr(self._file, "blocksize", None) or 0
            self._do(max(held, _PIECE_BYTES), self._file.close)

    def _do(self, size: int, act: Callable[[], object]) -> None:
        if self._file is None:
            raise ValueError("the file was given up")
        try:
            self._files.within(seconds_for(size, connections=1), act)
        except NoAnswerError:
            # Else it would be closed, and so made visible in parts, when its memory is freed.
            with contextlib.suppress(AttributeError):  # of files that have no such switch
                self._file.closed = True
            self._file = None
            raise


def _is_asynchronous(fs: Any, method: str) -> bool:
    """Whether a method only waits for a coroutine, the same with an underscore before its name."""
    if not getattr(fs, "async_impl", False):
        return False
    called = getattr(getattr(fs, method), "__wrapped__", None)
    return inspect.iscoroutinefunction(called)
