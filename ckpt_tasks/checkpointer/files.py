"""The tensor files of a checkpoint, for people who open one by themselves."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.reader import positions_of, read_index
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_rank
from ckpt_tasks.checkpointer.stored import Stored, StoredTensor
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, Index, TensorEntry
from ckpt_tasks.store.base import Store

__all__ = ["TensorFile", "TensorLine", "list_files", "list_tensors"]


class TensorFile(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file.

    Parameters
    ----------
    name
        What was tracked under it; ``ckpt_tasks.`` begins names of our own.
    path
        Relative to the store's root.
    url
        The same in full: of a store on this machine the file's path, as
        ``safetensors.torch.load_file`` takes it; else a URL, userinfo masked.
    size
        Bytes.
    """

    name: str
    rank: int
    path: str
    url: str
    size: int


class TensorLine(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor.

    Parameters
    ----------
    name, key
        What was tracked, and the tensor's name in its file, which those of its blocks begin with.
    ranks
        Who has written it: several, where it was saved in parts.
    dtype, shape
        As safetensors spells them; of the whole tensor.
    size
        Bytes, all parts together.
    """

    name: str
    ranks: list[int]
    key: str
    dtype: str
    shape: list[int]
    size: int


def list_files(store: Store, layout: RunLayout, record: CommitRecord) -> list[TensorFile]:
    """The checkpoint's files, by rank and in the order they were written.

    What holds no tensor has none: plain values stand in the index.

    Raises
    ------
    CorruptCheckpointError
        An index is damaged or missing.
    StoreError
        Storage did not answer.
    """
    root = store.url.removeprefix("file://").rstrip("/")
    return [
        TensorFile(
            name=layout.tracked_name(file.path, ref.rank),
            rank=ref.rank,
            path=layout.in_run(file.path),
            url=f"{root}/{layout.in_run(file.path)}",
            size=file.size,
        )
        for ref in record.indexes
        for file in read_index(store, layout, ref).files
    ]


def list_tensors(store: Store, layout: RunLayout, record: CommitRecord) -> list[TensorLine]:
    """The checkpoint's tensors, by rank and as they lie in their files; only indexes are read.

    One that several names share stands under the first; one that ranks hold alike, or saved parts
    of, stands where the first rank has written it. Raises as `list_files`.
    """
    checkpoint = open_rank(store, layout, record, 0)
    split = {
        stored: tensor for tensor in checkpoint.split_tensors() for stored in tensor.parts.values()
    }
    parts = {**_sharded_images(checkpoint), **split}
    lines = []
    listed: set[object] = set()
    for index in checkpoint.indexes:
        for number, entry in enumerate(index.tensors):
            stored = Stored(index.rank, number)
            tensor = parts.get(stored)
            if stored in parts:
                if tensor is None or tensor.identity in listed:
                    continue
                listed.add(tensor.identity)
            key = split[stored].name if stored in split else entry.key
            lines.append(_line(layout, index, entry, key, tensor))
    return lines


def _sharded_images(checkpoint: ShardedCheckpoint) -> dict[Stored, StoredTensor | None]:
    """Which tensor each part is of; of a part that is empty, or that another rank's stands for,
    ``None``.
    """
    found: dict[Stored, StoredTensor | None] = {}
    leaves = checkpoint.leaves()
    for index in checkpoint.indexes:
        plain = positions_of(index.items.values(), skip="sharded")
        for position in positions_of(index.items.values()) - plain:
            found.setdefault(checkpoint.stored(index.rank, position), None)
        for name, tree in index.items.items():
            for sharded in leaves.numbered(name, tree)[1]:
                tensor = checkpoint.tensor_of(sharded)
                found.update(dict.fromkeys(tensor.parts.values(), tensor))
    return found


def _line(
    layout: RunLayout, index: Index, entry: TensorEntry, key: str, tensor: StoredTensor | None
) -> TensorLine:
    shape, size, ranks = tuple(entry.shape), entry.size, {index.rank}
    if tensor is not None:
        shape = (*tensor.shape, *tensor.pairs)
        size = tensor.nbytes
        ranks = {stored.rank for stored in tensor.parts.values()}
    return TensorLine(
        name=layout.tracked_name(index.files[entry.file].path, index.rank),
        ranks=sorted(ranks),
        key=key,
        dtype=entry.dtype,
        shape=list(shape),
        size=size,
    )
