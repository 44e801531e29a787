"""The image of one rank's tensor files: which bytes lie where, before any is written."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ckpt_tasks.checkpointer.staged import StagedState, StagedTensor
from ckpt_tasks.format.safetensors import (
    HEADER_ALIGNMENT,
    TENSOR_ALIGNMENT,
    TensorSpec,
    build_header,
)

__all__ = ["FileImage", "Image", "Planner", "file_header", "plan_image"]


class FileImage(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file of an image.

    Parameters
    ----------
    item
        The tracked name whose tensors it holds.
    rows
        These are blocks of rows.
    header
        Its first bytes.
    start, size
        Where it lies in the image, on a page, and its bytes.
    positions
        Of its tensors in the state, in the order of the file.
    """

    item: str
    rows: bool
    header: bytes
    start: int
    size: int
    positions: list[int]


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """All files, one behind the other.

    Parameters
    ----------
    specs, items, offsets
        Of each tensor of the state, by position: what it is, the tracked name it belongs to, and
        where its bytes lie in the image.
    size
        Bytes of the image.
    """

    files: list[FileImage]
    specs: list[TensorSpec]
    items: list[str]
    offsets: list[int]
    size: int

    def name_of(self, position: int) -> tuple[str, str]:
        """Tracked name and name in its file of a tensor."""
        return self.items[position], self.specs[position].key

    def fill(self, memory: memoryview, state: StagedState) -> None:
        """Copy headers and tensors to where they lie; then training may go on."""
        for file in self.files:
            memory[file.start : file.start + len(file.header)] = file.header
        state.copy_into(memory, self.offsets)


class Planner:
    """Plans images. A state of the same tensors as the one before has the same plan."""

    def __init__(self) -> None:
        self._fingerprint: object = None
        self._image: Image | None = None
        self._encoded: msgspec.Raw | None = None

    def plan(self, state: StagedState) -> Image:
        fingerprint = [(t.item, t.key, t.dtype, t.shape) for t in state.tensors]
        if self._image is None or fingerprint != self._fingerprint:
            self._image = plan_image(state.tensors)
            self._fingerprint, self._encoded = fingerprint, None
        return self._image

    @property
    def encoded(self) -> msgspec.Raw:
        """The latest plan, as another process reads it (MessagePack)."""
        if self._encoded is None:
            self._encoded = msgspec.Raw(msgspec.msgpack.encode(self._image))
        return self._encoded


def plan_image(tensors: Sequence[StagedTensor]) -> Image:
    """Lay out one file for each tracked name, its tensors behind its header.

    Blocks of rows have another one: those that do not change are referred to only as long as they
    are a good part of the file, however much is beside them that changes always.
    """
    specs = [TensorSpec(t.key, t.dtype, tuple(t.shape)) for t in tensors]
    offsets = [0] * len(specs)
    files: list[FileImage] = []
    start = 0
    for (item, rows), positions in _by_file(tensors).items():
        # Those of odd sizes last: before them each tensor begins where torch would put it, and a
        # load can use the bytes where they lie.
        positions.sort(key=lambda position: specs[position].size % TENSOR_ALIGNMENT != 0)
        header = file_header(item, [specs[position] for position in positions])
        stop = start + len(header)
        for position in positions:
            offsets[position] = stop
            stop += specs[position].size
        files.append(
            FileImage(
                item=item,
                rows=rows,
                header=header,
                start=start,
                size=stop - start,
                positions=positions,
            )
        )
        start = -(-stop // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
    items = [t.item for t in tensors]
    return Image(files=files, specs=specs, items=items, offsets=offsets, size=start)


def file_header(item: str, specs: Sequence[TensorSpec]) -> bytes:
    """The header of the file that holds tensors of a tracked name, in this order."""
    return build_header(specs, {"format": "pt", "ckpt_tasks": item})


def _by_file(tensors: Sequence[StagedTensor]) -> dict[tuple[str, bool], list[int]]:
    positions: dict[tuple[str, bool], list[int]] = {}
    for position, tensor in enumerate(tensors):
        positions.setdefault((tensor.item, tensor.is_block), []).append(position)
    return positions
