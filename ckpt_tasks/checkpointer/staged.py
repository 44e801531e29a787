"""What the checkpointer asks of a captured state; `ckpt_tasks.state` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ckpt_tasks.format.records import RowBlocks, SharedTensor

__all__ = ["StagedState", "StagedTensor"]


class StagedTensor(Protocol):
    """A tensor to be written."""

    @property
    def item(self) -> str:
        """The tracked name it belongs to."""

    @property
    def key(self) -> str:
        """Its name in that item's file."""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""

    @property
    def is_block(self) -> bool:
        """Whether it is a block of rows of another."""


class StagedState(Protocol):
    """One rank's state: trees, and the tensors they refer to by position."""

    @property
    def trees(self) -> Mapping[str, Any]:
        """Tracked name to JSON-ready tree."""

    @property
    def tensors(self) -> Sequence[StagedTensor]:
        """In the order of their positions."""

    @property
    def row_blocks(self) -> Sequence[RowBlocks]:
        """Tensors that were split, whose blocks are among the tensors."""

    @property
    def shared(self) -> Sequence[SharedTensor]:
        """Tensors that another rank writes; known when `finish_copy` has returned."""

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        """Copy each tensor's bytes, row-major, to its offset in `buffer`.

        When this returns, training may go on. What `finish_copy` copies is kept from changing.
        """

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        """Copy what `copy_into` has left; returns for how many seconds training has waited for it.

        Called once, by any thread. Raises `TornStateError` where it has changed all the same.
        """

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        """Names of parameters that hold NaN or infinity, as they were copied."""
