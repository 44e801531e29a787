"""A database that MLflow opens directly: one process at a time makes or upgrades its tables.

MLflow does both when it opens the database, without a lock and in hundreds of transactions: two
processes at once, or one that is killed, leave a SQLite file that can never be opened again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.store.db.db_types import DATABASE_ENGINES, SQLITE

from ckpt_tasks.errors import RegistryError
from ckpt_tasks.masking import mask_url

__all__ = ["is_database", "lock_path", "opening"]

_WAIT_SECONDS = 60.0
"""Many times what new tables take. The upgrade of a large database may take longer: the caller
repeats its call."""
_POLL_SECONDS = 0.05
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def is_database(uri: str) -> bool:
    """Whether MLflow opens `uri` itself, rather than asking a server or keeping files."""
    return _engine(uri) in DATABASE_ENGINES


def _engine(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


@contextmanager
def opening(uri: str) -> Iterator[None]:
    """Let no other process of this machine open the database meanwhile; a SQLite file has all of
    its tables from the start.

    Processes of other machines, and programs that open the database by MLflow alone, are not
    kept out, except by a folder that they share, where the lock lies beside the SQLite file.

    Raises
    ------
    RegistryError
        If others have kept the database for a minute.
    """
    if not is_database(uri):
        yield
        return
    # Its import takes ten times as long as opening a database that has its tables: not while
    # others wait.
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    lock = lock_path(uri)
    if lock is None:
        yield
        return
    with _locked(lock, mask_url(uri)):
        if file := _sqlite_file(uri):
            _fill(file)
        yield


def lock_path(uri: str) -> Path | None:
    """The file that is locked: beside a SQLite file, else in the folder for temporary files; none
    for a database in memory.
    """
    if file := _sqlite_file(uri):
        return file.with_name(f"{file.name}.ckpt-tasks-lock")
    if _engine(uri) == SQLITE:
        return None
    digest = hashlib.sha256(mask_url(uri).encode()).hexdigest()[:16]
    # A lock file of another user could not be opened.
    return Path(tempfile.gettempdir(), f"ckpt-tasks-mlflow-{os.getuid()}-{digest}.lock")


def _sqlite_file(uri: str) -> Path | None:
    """The file itself, whatever links lead to it and wherever a relative path starts."""
    name = uri.partition(":///")[2].partition("?")[0]
    if _engine(uri) != SQLITE or name in ("", ":memory:") or name.startswith("file:"):
        return None
    return Path(name).resolve()


@contextmanager
def _locked(path: Path, shown: str) -> Iterator[None]:
    try:
        descriptor = _wait_for(path, shown)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        # Nor can this process write the database, then, whose journal would lie there too.
        yield
        return
    try:
        yield
    finally:
        # While it is locked: who waits for it finds that it is gone, and makes another.
        with suppress(OSError):
            path.unlink()
        # Closing is not enough: a child forked meanwhile has the descriptor as well.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _wait_for(path: Path, shown: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _WAIT_SECONDS
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise RegistryError(
                f"MLflow's database {shown} was not opened: for {_WAIT_SECONDS:g} s other "
                f"processes have been making or upgrading its tables, and hold {path}"
            )
        time.sleep(_POLL_SECONDS)
    return descriptor


def _try_lock(path: Path) -> int | None:
    # `flock`, for the system gives it up when the process dies, however it dies.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    locked = False
    with suppress(BlockingIOError, FileNotFoundError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(descriptor), path.stat())
        finally:
            if not locked:
                os.close(descriptor)
    return descriptor if locked else None


def _fill(file: Path) -> None:
    """Give an empty SQLite file MLflow's tables in a single transaction, made elsewhere."""
    if not _is_empty(file):
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-tasks-mlflow-") as folder:
        made = Path(folder, "mlflow.db")
        MlflowClient(f"sqlite:///{made}")
        # Again: somebody may have opened it by MLflow alone meanwhile.
        if _is_empty(file):
            with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(file)) as target:
                source.backup(target)


def _is_empty(file: Path) -> bool:
    if not file.exists():
        return True
    with closing(sqlite3.connect(file)) as database:
        return not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
