"""All that a checkpoint refers to: its indexes, and the files that they name."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckpt_tasks.checkpointer.reader import read_index_bytes
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, Index, TensorEntry
from ckpt_tasks.replica.transfer import WantedFile
from ckpt_tasks.store.base import Store

__all__ = ["Closure", "read_closure"]


class Closure(msgspec.Struct, frozen=True):
    """What a checkpoint refers to, by path in the run's folder.

    Parameters
    ----------
    indexes
        Of all ranks, verified, as they lie in the store.
    files
        Which it names, of this write and of earlier ones.
    """

    indexes: Mapping[str, bytes]
    files: Mapping[str, WantedFile]

    def covers(self, file: WantedFile) -> bool:
        """Whether all by which `file` is verified is verified here, too."""
        own = self.files.get(file.entry.path)
        if own is None or own.entry != file.entry:
            return False
        known = {_place(tensor) for tensor in own.tensors}
        return all(_place(tensor) in known for tensor in file.tensors)


def read_closure(store: Store, layout: RunLayout, record: CommitRecord) -> Closure:
    """Read the indexes of a checkpoint, and gather what they name.

    Raises
    ------
    CorruptCheckpointError
        An index is missing or damaged, or two of them differ on a file.
    StoreError
        Storage failed.
    """
    indexes: dict[str, bytes] = {}
    files: dict[str, WantedFile] = {}
    for ref in record.indexes:
        indexes[ref.path] = read_index_bytes(store, layout, ref)
        index = decode(indexes[ref.path], Index, path=ref.path)
        named = [files.setdefault(file.path, WantedFile(file, [])) for file in index.files]
        for file, wanted in zip(index.files, named, strict=True):
            if wanted.entry != file:
                raise CorruptCheckpointError(f"the indexes of {record.id} differ on {file.path}")
        for tensor in index.tensors:
            named[tensor.file].tensors.append(tensor)
    return Closure(indexes, files)


def _place(tensor: TensorEntry) -> tuple[object, ...]:
    return tensor.key, tensor.dtype, tensor.offset, tensor.size, tuple(tensor.chunks)
