"""The tensor files of a checkpoint, for people who open one by themselves."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
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
        What was tracked, and the tensor's name in its file.
    dtype, shape
        As safetensors spells them.
    size
        Bytes.
    """

    name: str
    rank: int
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

    A tensor that several names share stands under the first. Raises as `list_files`.
    """
    return [
        TensorLine(
            name=layout.tracked_name(index.files[tensor.file].path, ref.rank),
            rank=ref.rank,
            key=tensor.key,
            dtype=tensor.dtype,
            shape=tensor.shape,
            size=tensor.size,
        )
        for ref in record.indexes
        for index in [read_index(store, layout, ref)]
        for tensor in index.tensors
    ]
