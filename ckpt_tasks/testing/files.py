"""Faults of a file system: at chosen system calls on what lies below a folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn
from unittest.mock import patch

from ckpt_tasks.testing.faults import Fault, FaultInjector

__all__ = ["FILE_OPERATIONS", "faulty_files"]

FILE_OPERATIONS = frozenset(
    f"file.{name}"
    for name in ("open", "mkdir", "writev", "fsync", "link", "rename", "unlink", "rmdir")
)
"""Operations that change a file system, as `FaultInjector.log` names them."""

_ON_DESCRIPTORS = ("writev", "fsync")
_WITH_TARGET = ("link", "rename")


@contextlib.contextmanager
def faulty_files(
    root: str | os.PathLike[str], faults: Iterable[Fault] | FaultInjector = ()
) -> Iterator[FaultInjector]:
    """Count this process's calls of `os` on what lies below `root`, and let faults strike them.

    Finer than `FaultyStore` around a `LocalStore`, each of whose operations is several such calls.
    A fault that raises raises an `OSError` with ``EIO``; a ``writev`` that is struck ``during``
    writes half of its bytes first. Of what is opened, new files count, and not by Python's `open`.

    Parameters
    ----------
    root
        Of a `LocalStore`.
    faults
        What goes wrong; none, to count only. Or what counts the operations of other things, too.
    """
    injector = faults if isinstance(faults, FaultInjector) else FaultInjector(faults)
    calls = _Calls(os.path.abspath(root), injector)
    with contextlib.ExitStack() as stack:
        for operation in FILE_OPERATIONS:
            name = operation.removeprefix("file.")
            call = functools.partial(calls.run, name, getattr(os, name))
            stack.enter_context(patch.object(os, name, call))
        yield injector


class _Calls:
    def __init__(self, root: str, injector: FaultInjector) -> None:
        self._root = root
        self._injector = injector
        self._opened: dict[int, str] = {}  # a number that is used again is noted again

    def run(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = self._path(name, args, kwargs)
        if path is None or (name == "open" and not args[1] & os.O_CREAT):
            result = call(*args, **kwargs)
        else:
            result = self._injector.run(
                f"file.{name}",
                os.path.relpath(path, self._root),
                functools.partial(call, *args, **kwargs),
                error=lambda message: OSError(errno.EIO, message, path),
                half=functools.partial(_write_half, *args) if name == "writev" else None,
            )
        if name == "open":
            self._note(result, path)
        return result

    def _path(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What a call is about; ``None`` where that does not lie below the root."""
        if name in _ON_DESCRIPTORS:
            return self._opened.get(args[0])
        to_target = name in _WITH_TARGET
        given = os.fsdecode(args[1] if to_target else args[0])
        folder = kwargs.get("dst_dir_fd" if to_target else "dir_fd")
        if folder is not None and not os.path.isabs(given):
            if folder not in self._opened:
                return None
            given = os.path.join(self._opened[folder], given)
        path = os.path.abspath(given)
        return path if path == self._root or path.startswith(f"{self._root}/") else None

    def _note(self, descriptor: int, path: str | None) -> None:
        if path is not None:
            self._opened[descriptor] = path
        else:
            self._opened.pop(descriptor, None)


def _write_half(descriptor: int, views: Iterable[Any], strike: Callable[[], NoReturn]) -> Any:
    data = b"".join(views)
    os.write(descriptor, data[: len(data) // 2])
    strike()
