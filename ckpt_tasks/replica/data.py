"""The files and indexes of a replica: which are there and right, and bringing what is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.errors import CorruptCheckpointError, StoreError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.replica.closure import Closure, read_closure
from ckpt_tasks.replica.transfer import WantedFile, copy_file, is_whole
from ckpt_tasks.store.base import Store

__all__ = ["ReplicaData"]

_FILES = 3
"""How many are copied at once."""


class ReplicaData:
    """What the target holds of a run's data, and how it gets what it lacks."""

    def __init__(self, source: Store, target: Store, layout: RunLayout) -> None:
        self._source = source
        self._target = target
        self._layout = layout
        self._sizes: dict[str, int] = {}  # by path in the run's folder
        self._before: _Brought | None = None

    def look(self) -> None:
        """See what is there."""
        self._sizes = self._list(self._layout.data)

    def remember(self, record: CommitRecord, closure: Closure | None = None) -> None:
        """The target has this checkpoint: the next one may share files with it, which are right."""
        self._before = _Brought(self._target, self._layout, record, closure)

    def bring(self, closure: Closure) -> Iterator[int]:
        """Have the target hold all that a checkpoint refers to, the indexes last.

        Yields the bytes of each object, 0 where it was there already. Raises as `copy_file`.
        """
        with ThreadPoolExecutor(_FILES, thread_name_prefix="copy") as pool:
            yield from pool.map(self._bring_file, closure.files.values())
        for path, content in closure.indexes.items():
            if self._holds(path, content):
                yield 0
                continue
            self._target.replace(self._layout.in_run(path), [content], len(content))
            self._sizes[path] = len(content)
            yield len(content)

    def check(self, closure: Closure) -> None:
        """Raise `StoreError` unless all of it is there now, right before the record: that must not
        name what somebody has removed meanwhile.
        """
        wanted = {path: len(content) for path, content in closure.indexes.items()}
        wanted |= {path: file.entry.size for path, file in closure.files.items()}
        sizes: dict[str, int] = {}
        for folder in {f"{self._layout.in_run(path).rpartition('/')[0]}/" for path in wanted}:
            sizes |= self._list(folder)
        for path, size in wanted.items():
            if sizes.get(path) != size:
                raise StoreError(
                    f"{path} has been removed from the replica in {self._target.url} while it was "
                    "copied to; nothing was committed"
                )

    def _list(self, prefix: str) -> dict[str, int]:
        listed = self._target.list_objects(prefix)
        return {info.path.removeprefix(self._layout.folder): info.size for info in listed}

    def _holds(self, path: str, content: bytes) -> bool:
        """Whether the target has these very bytes."""
        if self._sizes.get(path) != len(content):
            return False
        return self._target.read(self._layout.in_run(path), limit=len(content)) == content

    def _bring_file(self, file: WantedFile) -> int:
        path = self._layout.in_run(file.entry.path)
        if self._is_right(path, file):
            return 0
        wanted = self._with_what_others_need(file)
        try:
            copy_file(self._source, self._target, path, wanted)
        except CorruptCheckpointError:
            # Once more, before damage is believed: a transfer can fail too.
            copy_file(self._source, self._target, path, wanted)
        self._sizes[file.entry.path] = file.entry.size
        return file.entry.size

    def _is_right(self, path: str, file: WantedFile) -> bool:
        """Whether the target has the file; it is read, unless that was done."""
        if self._sizes.get(file.entry.path) != file.entry.size:
            return False
        known = self._before is not None and self._before.covers(file)
        return known or is_whole(self._target, path, file)

    def _with_what_others_need(self, file: WantedFile) -> WantedFile:
        """With the tensors of the checkpoints in the target that name the file already, which is
        damaged there: what takes its place must be right for them too.
        """
        if file.entry.path not in self._sizes:
            return file
        tensors = list(file.tensors)
        for checkpoint in list_checkpoints(self._target, self._layout):
            record = read_commit(self._target, self._layout, checkpoint)
            named = read_closure(self._target, self._layout, record).files.get(file.entry.path)
            tensors += named.tensors if named is not None else []
        return WantedFile(file.entry, tensors)


class _Brought:
    """What the checkpoint before has brought: those bytes are right, and not read again.

    Parameters
    ----------
    closure
        Of the checkpoint, where it is known; else it is read from the target when asked for.
    """

    def __init__(
        self, target: Store, layout: RunLayout, record: CommitRecord, closure: Closure | None
    ) -> None:
        self._target = target
        self._layout = layout
        self._record = record
        self._closure = closure

    def covers(self, file: WantedFile) -> bool:
        """Whether all by which a file is verified has been verified."""
        if self._closure is None:
            try:
                self._closure = read_closure(self._target, self._layout, self._record)
            except CorruptCheckpointError:
                return False
        return self._closure.covers(file)
