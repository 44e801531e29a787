"""The tensor files of a checkpoint, for people who open one by themselves."""

from __future__ import annotations

import msgspec

from ckpt_tasks.checkpointer.reader import read_index
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.store.base import Store

__all__ = ["TensorFile", "list_files"]


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
