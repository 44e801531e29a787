"""What was restored, and what of it is still to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ckpt_tasks.format.blocks import Part

__all__ = ["ReadImages", "RestoredValues"]

ReadImages = Callable[[Mapping[int, Sequence[Part]]], None]
"""Reads blocks of images, by index, into memory that they have."""


class RestoredValues(dict[str, Any]):
    """Tracked name to state dict or plain value.

    Parameters
    ----------
    index_of
        ``id()`` of each tensor within, to the index of the image it was made from: tensors of
        one index shared their memory when they were captured.
    read
        Of images by index, reads blocks into the memory that the tensors have already: those that
        nobody had read, since it was not known how much of them is needed. Default: none such.
    """

    def __init__(
        self, index_of: dict[int, int] | None = None, read: ReadImages = lambda wanted: None
    ) -> None:
        super().__init__()
        self.index_of = {} if index_of is None else index_of
        self._read = read
        self._wanted: dict[int, list[Part]] = {}
        self._kept: list[torch.Tensor] = []

    def want(self, tensor: torch.Tensor, block: Part) -> None:
        """A block of a tensor is needed."""
        index = self.index_of.get(id(tensor))
        if index is not None:
            self._wanted.setdefault(index, []).append(block)

    def read_wanted(self) -> None:
        """Read what is needed of the tensors within. Of one of which a block was wanted, the rest
        never holds any values; one that nobody has asked for is read whole.

        Raises as what reads it.
        """
        self._read(self._wanted)
        self._wanted = {}

    def keep(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """`after` stands in the place of `before`, whose ``id()`` must not be used again."""
        self._kept.append(before)
        index = self.index_of.get(id(before))
        if index is not None:
            self.index_of[id(after)] = index
