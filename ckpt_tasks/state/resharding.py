"""Sharded tensors back from storage, onto whatever placement the live object has.

A saved sharded tensor is the parts that ranks have written, in whatever cut. What is read of it
depends on what takes it: a DTensor takes its own rank's part, a plain tensor all of it. Nothing
here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import Part, whole
from ckpt_tasks.format.sharded import ShardedTensor
from ckpt_tasks.state.tensors import values_from_image

__all__ = ["ReadBlocks", "ShardedValue", "read_pieces"]

ReadBlocks = Callable[[Sequence[tuple[ShardedTensor, Part]]], Sequence[torch.Tensor]]
"""Of blocks of tensors: their images, on the CPU."""


class ShardedValue:
    """A tensor that was saved in parts, not yet read.

    Parameters
    ----------
    saved
        Its parts.
    read
        Reads some blocks of them.
    """

    def __init__(self, saved: ShardedTensor, read: ReadBlocks) -> None:
        self.name = saved.name
        self.shape = torch.Size(saved.shape)
        self.saved = saved
        self.read = read
        self._pieces: dict[Part, torch.Tensor] = {}

    def whole(self) -> torch.Tensor:
        """All of it, on the CPU; a parameter, or requiring grad, where it was saved as such."""
        tensor = self.piece(whole(self.shape))
        if self.saved.is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=self.saved.requires_grad)
        return tensor.requires_grad_() if self.saved.requires_grad else tensor

    def piece(self, wanted: Part) -> torch.Tensor:
        """One block of it, on the CPU; the same tensor at every call.

        Raises `CorruptCheckpointError` where the saved parts do not cover it.
        """
        if not self.holds(wanted):
            read_pieces([(self, wanted)])
        return self._pieces[_place(wanted)]

    def keep(self, wanted: Part, image: torch.Tensor) -> None:
        """Hold a block that was read."""
        self._pieces[_place(wanted)] = self._values(image, wanted)

    def holds(self, wanted: Part) -> bool:
        """Whether a block was read already."""
        return _place(wanted) in self._pieces

    def _values(self, image: torch.Tensor, wanted: Part) -> torch.Tensor:
        parts = self.saved.parts
        same = next((saved for saved in parts if _place(saved.part) == _place(wanted)), None)
        # Where a part is read as it was, its memory format comes back too; its device never.
        members, source = (("dtype",), parts[0]) if same is None else (("dtype", "stride"), same)
        details: dict[str, Any] = {
            key: source.details[key] for key in members if key in source.details
        }
        try:
            tensor = values_from_image(image, details)
        except ValueError as error:
            raise CorruptCheckpointError(f"{self.name} is damaged: {error}") from error
        if tuple(tensor.shape) != tuple(wanted.sizes):
            raise CorruptCheckpointError(
                f"a part of {self.name} has shape {list(tensor.shape)}, not {list(wanted.sizes)}"
            )
        return tensor


def read_pieces(pieces: Iterable[tuple[ShardedValue, Part]]) -> None:
    """Read blocks of many values in one go; each value holds its own.

    Raises as what reads them.
    """
    distinct = {(id(value), _place(part)): (value, part) for value, part in pieces}
    by_reader: dict[ReadBlocks, list[tuple[ShardedValue, Part]]] = {}
    for value, part in distinct.values():
        if not value.holds(part):
            by_reader.setdefault(value.read, []).append((value, part))
    for read, wanted in by_reader.items():
        images = read([(value.saved, part) for value, part in wanted])
        for (value, part), image in zip(wanted, images, strict=True):
            value.keep(part, image)


def _place(part: Part) -> Part:
    return Part(part.offsets, part.sizes)
