"""Gathering what all ranks have written: all of it is there, or nothing is committed.

A rank's index is created last, whole and when its files are durable, so that its existence says
that the rank is done. Rank 0's writer looks for the others' in the store itself: no trainer need
be alive for that, and none need share a machine with it. (A local index may be seen a moment
before its directory has been synchronised. The commit's own fsync, later in the same journal,
covers that.)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt_tasks.errors import CorruptCheckpointError, ObjectNotFoundError, StoreError
from ckpt_tasks.format.codec import decode, index_digest
from ckpt_tasks.format.digest import digest_of_chunks
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import MAX_INDEX_BYTES, Index, IndexRef, TensorEntry
from ckpt_tasks.store.base import Store

__all__ = ["GatheredRanks", "IndexKeys", "gather_indexes"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks for one index
_FILE_RANK = re.compile(r"\.rank([0-9]+)(?:\.rows)?\.safetensors$", re.ASCII)
_NAMED = 8  # ranks or tensors that a message names


class GatheredRanks(msgspec.Struct, frozen=True):
    """What all ranks of one write have left in the store.

    Parameters
    ----------
    refs, indexes
        Of each rank, in order: what the commit record names, and what it refers to.
    size, written
        Bytes of all files and indexes; and of those that this write has made.
    nonfinite
        Names of parameters that hold NaN or infinity on any rank, each once.
    """

    refs: list[IndexRef]
    indexes: list[Index]
    size: int
    written: int
    nonfinite: list[str]


def gather_indexes(
    store: Store,
    layout: RunLayout,
    write_id: str,
    world_size: int,
    own: IndexRef,
    *,
    seconds: float,
    failure: Callable[[], str | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> GatheredRanks:
    """Wait until every rank has written its index, and check that they make one checkpoint.

    Parameters
    ----------
    own
        Of the rank that gathers, usually 0.
    seconds
        How long the others may take from now on.
    failure
        Says why a rank will not write its part, as soon as somebody knows: then nobody waits.

    Raises
    ------
    StoreError
        A rank's index is missing, belongs to something else, or refers to a tensor that another
        rank has not written, or has written with other values. Nothing may be committed.
    """
    give_up_at = clock() + seconds
    data: dict[int, bytes] = {}
    pause = _FIRST_PAUSE
    while True:
        # Asked first: a rank that has ended may have written its part just before.
        why = failure()
        for rank in range(world_size):
            if rank not in data:
                found = _read_if_there(store, _path(layout, write_id, rank))
                if found is None:
                    break  # the others are looked at when this one is there
                data[rank] = found
                pause = _FIRST_PAUSE
        if len(data) == world_size:
            return _checked(layout, write_id, data, own)
        if why is not None or clock() >= give_up_at:
            missing = [
                rank
                for rank in range(world_size)
                if rank not in data and not store.exists(_path(layout, write_id, rank))
            ]
            raise StoreError(_incomplete(write_id, missing, world_size, why, seconds))
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


class IndexKeys:
    """The tensors of several ranks' indexes, by the names under which other ranks share them.

    Parameters
    ----------
    indexes
        By rank.
    """

    def __init__(self, indexes: Mapping[int, Index]) -> None:
        self._entries: dict[tuple[int, str, str], tuple[int, TensorEntry]] = {}
        for rank, index in indexes.items():
            items = [_item_of(file.path, rank) for file in index.files]
            for number, entry in enumerate(index.tensors):
                self._entries[rank, items[entry.file], entry.key] = number, entry

    def find(self, rank: int, item: str, key: str) -> tuple[int, TensorEntry] | None:
        """Number of the tensor among those that `rank` has written, and its entry."""
        return self._entries.get((rank, item, key))


def _item_of(path: str, rank: int) -> str:
    """Tracked name of a file, which an earlier write of another rank may have made."""
    written_by = _FILE_RANK.search(path)
    return RunLayout.tracked_name(path, int(written_by[1]) if written_by else rank)


def _path(layout: RunLayout, write_id: str, rank: int) -> str:
    return layout.in_run(f"{layout.write_folder_in_run(write_id)}/{layout.index_name(rank)}")


def _read_if_there(store: Store, path: str) -> bytes | None:
    try:
        return store.read(path, limit=MAX_INDEX_BYTES)
    except ObjectNotFoundError:
        return None


def _incomplete(
    write_id: str, missing: Sequence[int], world_size: int, why: str | None, seconds: float
) -> str:
    named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
    reason = why if why is not None else f"not there after {seconds:.0f} s"
    return (
        f"{write_id} is incomplete, so nothing is committed: of {world_size} ranks, the part of "
        f"rank {named or 'none'} is missing ({reason})"
    )


def _checked(
    layout: RunLayout, write_id: str, data: Mapping[int, bytes], own: IndexRef
) -> GatheredRanks:
    folder = layout.write_folder_in_run(write_id)
    refs: list[IndexRef] = []
    indexes: list[Index] = []
    for rank in sorted(data):
        path = f"{folder}/{layout.index_name(rank)}"
        index = _decoded(data[rank], path)
        if (index.rank, index.world_size) != (rank, len(data)):
            raise StoreError(
                f"{path} is the index of rank {index.rank} of {index.world_size}, where that of "
                f"rank {rank} of {len(data)} belongs"
            )
        refs.append(
            IndexRef(rank=rank, path=path, size=len(data[rank]), digest=index_digest(data[rank]))
        )
        indexes.append(index)
    if refs[own.rank] != own:
        raise StoreError(f"{own.path} is not what rank {own.rank} has just written there")
    _check_shared(write_id, indexes)
    size = sum(len(each) for each in data.values())
    files = [file for index in indexes for file in index.files]
    written = size + sum(file.size for file in files if file.path.startswith(f"{folder}/"))
    size += sum(file.size for file in files)
    names = [name for index in indexes for name in index.nonfinite or []]
    return GatheredRanks(refs, indexes, size, written, list(dict.fromkeys(names)))


def _decoded(data: bytes, path: str) -> Index:
    try:
        return decode(data, Index, path=path)
    except CorruptCheckpointError as error:
        raise StoreError(f"what a rank has written cannot be read: {error}") from error


def _check_shared(write_id: str, indexes: Sequence[Index]) -> None:
    """Ranks that hold different values for what one of them wrote for all make no checkpoint."""
    keys = IndexKeys({index.rank: index for index in indexes})
    wrong = [
        f"{shared.item}[{shared.key!r}] of rank {index.rank}"
        for index in indexes
        for shared in index.shared or []
        if not _is_written(keys, shared.rank, shared.item, shared.key, shared.digest)
    ]
    if wrong:
        named = ", ".join(wrong[:_NAMED]) + (", ..." if len(wrong) > _NAMED else "")
        raise StoreError(
            f"{write_id} is not committed: the ranks' values differ where one was to write for "
            f"all ({named}); the next save keeps those of each rank"
        )


def _is_written(keys: IndexKeys, rank: int, item: str, key: str, expected: str) -> bool:
    found = keys.find(rank, item, key)
    return found is not None and digest_of_chunks(found[1].chunks) == expected
