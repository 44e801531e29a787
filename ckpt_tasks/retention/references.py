"""Which objects a checkpoint needs: its indexes, and the files that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.store.base import Store

__all__ = ["files_of", "files_of_each"]

_PARALLEL_READS = 16


def files_of(store: Store, layout: RunLayout, record: CommitRecord) -> dict[str, int]:
    """Bytes of every object that the checkpoint needs, by path from the store's root.

    Raises
    ------
    CorruptCheckpointError
        An index is missing or damaged, so that nobody knows.
    UnsupportedFormatError
        A later version wrote it.
    """
    found: dict[str, int] = {}
    for ref in record.indexes:
        found[layout.in_run(ref.path)] = ref.size
        for file in read_index(store, layout, ref).files:
            found[layout.in_run(file.path)] = file.size
    return found


def files_of_each(
    records: Iterable[CommitRecord], read: Callable[[CommitRecord], dict[str, int]]
) -> dict[str, dict[str, int]]:
    """What `read` tells of many checkpoints, by id; see `files_of`."""
    wanted = list(records)
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        files = pool.map(read, wanted)
        return {record.id: each for record, each in zip(wanted, files, strict=True)}
