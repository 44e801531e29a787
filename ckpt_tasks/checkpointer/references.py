"""Which bytes of earlier writes a commit may refer to: those that a collection will not remove.

A file stays as long as the index of any commit record names it (see `retention.collect`). So a
reference is safe where a checkpoint that is committed, and marked for nothing, names the file
itself: the one whose write made it, or the one that this attempt saved last, or started from. Its
expiry, should it come after this look at the marks, is followed by a grace that this commit does
not outlast.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_tasks.checkpointer.marks import marked
from ckpt_tasks.checkpointer.reader import read_commit, read_index
from ckpt_tasks.errors import CheckpointNotFoundError, CorruptCheckpointError, StoreError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, Index
from ckpt_tasks.store.base import Store
from ckpt_tasks.types import CheckpointId

__all__ = ["Base", "check_references"]

Age = tuple[int, int]
"""Attempt, and sequence in it: of a checkpoint, and of the write that made it."""


class Base:
    """The checkpoint in which this attempt's writers look for bytes that need not be written again.

    Parameters
    ----------
    age
        Which one it is.
    files
        Paths of the files that its indexes name, of all ranks; ``None``: read when asked for.
    """

    def __init__(self, age: Age, files: Iterable[str] | None = None) -> None:
        self.age = age
        self._files = None if files is None else frozenset(files)

    @classmethod
    def of(cls, record: CommitRecord, indexes: Iterable[Index]) -> Base:
        """The checkpoint that has just been committed."""
        files = (file.path for index in indexes for file in index.files)
        return cls(_age(record.checkpoint), files)

    def names(
        self, path: str, store: Store, layout: RunLayout, committed: Iterable[CheckpointId]
    ) -> bool:
        """Whether its indexes name a file. One that cannot be read names none."""
        if self._files is None:
            self._files = frozenset(self._read(store, layout, committed))
        return path in self._files

    def _read(self, store: Store, layout: RunLayout, committed: Iterable[CheckpointId]) -> set[str]:
        own = [checkpoint for checkpoint in committed if _age(checkpoint) == self.age]
        try:
            refs = [ref for one in own for ref in read_commit(store, layout, one).indexes]
            return {file.path for ref in refs for file in read_index(store, layout, ref).files}
        except (CorruptCheckpointError, CheckpointNotFoundError):
            return set()


def check_references(
    store: Store, layout: RunLayout, write_id: str, indexes: Iterable[Index], base: Base | None
) -> None:
    """Refuse to commit references to bytes that may be removed, or are known to be damaged.

    Parameters
    ----------
    write_id
        Of the checkpoint that is to be committed.
    base
        What its attempt saved last or started from, if it refers to anything by way of that.

    Raises `StoreError`: the save has failed, and the next one writes everything.
    """
    own = layout.write_folder_in_run(write_id) + "/"
    foreign = {
        file.path for index in indexes for file in index.files if not file.path.startswith(own)
    }
    if not foreign:
        return
    marks = marked(store, layout)  # before the commits: a removed mark is of a removed record
    found = (layout.checkpoint_id(info.path) for info in store.list_objects(layout.commits))
    committed = [checkpoint for checkpoint in found if checkpoint is not None]
    damaged = {_age(checkpoint) for checkpoint in marks["quarantined"]}
    doomed = {_age(one) for one in (*marks["expired"], *marks["collecting"])}
    standing = {_age(checkpoint) for checkpoint in committed} - doomed
    own_age = layout.write_of(f"{own}index")

    def is_safe(path: str) -> bool:
        age = layout.write_of(path)
        if age is None or age in damaged:
            return False
        if base is not None and base.age in damaged:
            return False  # any file that it names may be what is wrong with it
        if age in standing:
            return True
        if age not in doomed and _is_of_this_attempt(age, own_age, base):
            return True
        return (
            base is not None and base.age in standing and base.names(path, store, layout, committed)
        )

    for path in sorted(foreign):
        if not is_safe(path):
            raise StoreError(
                f"{path} of run {layout.run!r}, which this checkpoint refers to, is marked as "
                "expired or damaged; the next save writes those bytes again"
            )
        if not store.exists(layout.in_run(path)):
            raise StoreError(
                f"{path} of run {layout.run!r}, which this checkpoint refers to, is gone"
            )


def _is_of_this_attempt(age: Age, own: Age | None, base: Base | None) -> bool:
    """Whether a write of this attempt was made since `base`, and never committed, as happens where
    another rank failed: a collection leaves those alone while the attempt lives.
    """
    since = base.age if base is not None else (0, 0)
    return own is not None and age[0] == own[0] and since < age < own


def _age(checkpoint: CheckpointId) -> Age:
    return checkpoint.attempt, checkpoint.sequence
