"""From a loaded checkpoint to the values of its tracked names."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ckpt_tasks.checkpointer.reader import LoadedCheckpoint
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.state.capture import RestoredValues, restore_values
from ckpt_tasks.state.tensors import tensor_from_buffer

__all__ = ["restored_values"]


def restored_values(
    start: LoadedCheckpoint, required: Collection[str], *, only: Collection[str] | None = None
) -> RestoredValues:
    """The saved values of all tracked names, or of `only` some.

    Raises `CorruptCheckpointError` where one of the `required` names is missing, or the trees
    do not fit the tensors.
    """
    missing = set(required) - start.trees.keys()
    if missing:
        raise CorruptCheckpointError(f"{start.record.id} lacks {sorted(missing)}")
    trees = {name: tree for name, tree in start.trees.items() if only is None or name in only}
    index = start.index

    def tensor_at(position: int) -> torch.Tensor:
        try:
            entry = index.tensors[position]
        except IndexError as error:
            raise CorruptCheckpointError(
                f"{start.record.id} refers to tensor {position} of {len(index.tensors)}"
            ) from error
        return tensor_from_buffer(start.tensors[position], entry.dtype, entry.shape)

    return restore_values(trees, tensor_at)
