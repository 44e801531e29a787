"""Tensors as they lie in a store, and reading blocks of them.

Digests cover chunks of 4 MiB of each stored tensor, so a block is read as the chunks that hold it.
Of many blocks each chunk is read once, whichever of them it is for, in one queue of windows; what
lies together in a file comes with one request. Each chunk is checked, and then copied to where its
values belong. Memory is that of the blocks, and of a few windows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ckpt_tasks.checkpointer.runs import Target, copy_runs, pieces_with
from ckpt_tasks.checkpointer.windows import (
    Chunk,
    Window,
    WindowReader,
    check_header,
    chunks_of,
    for_each,
    windows,
)
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import Part, Runs, overlap, runs_between, volume, whole
from ckpt_tasks.format.digest import CHUNK_BYTES
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import FileEntry, Index, TensorEntry
from ckpt_tasks.format.safetensors import DTYPE_BYTES
from ckpt_tasks.store.base import Store

__all__ = ["Image", "Stored", "StoredReader", "StoredTensor", "Wanted", "joined_rows"]


class Stored(NamedTuple):
    """An image as it lies in the store: which rank wrote it, and as which of its tensors."""

    rank: int
    number: int


class Image(NamedTuple):
    """Verified values: writable bytes, dtype as safetensors spells it, shape."""

    data: memoryview
    dtype: str
    shape: tuple[int, ...]


Wanted = Mapping[Stored, Sequence[Target]]
"""What of stored images goes where; an image without targets is verified, and nothing is kept."""


class StoredTensor:
    """A tensor that lies in the store, whole or in parts.

    Parameters
    ----------
    name
        For messages.
    shape
        Of the whole tensor, without the dimension that only its images have (see `state.tensors`).
    parts
        By place: the image that holds it, and its entry.

    Raises
    ------
    CorruptCheckpointError
        Entries that do not fit one another, or the places.
    """

    def __init__(
        self, name: str, shape: Sequence[int], parts: Mapping[Part, tuple[Stored, TensorEntry]]
    ) -> None:
        if not parts:
            raise CorruptCheckpointError(f"no part of {name} was saved")
        self.name = name
        self.shape = tuple(shape)
        self.parts = {Part(*part[:2]): stored for part, (stored, _) in parts.items()}
        entries = [entry for _, entry in parts.values()]
        self.dtype = entries[0].dtype
        self.pairs = tuple(entries[0].shape[len(self.shape) :])
        for part, entry in zip(parts, entries, strict=True):
            if entry.dtype != self.dtype or tuple(entry.shape) != (*part.sizes, *self.pairs):
                raise CorruptCheckpointError(
                    f"a part of {name} is {entry.dtype} of shape {entry.shape}, where others are "
                    f"{self.dtype} and its extents are {list(part.sizes)}"
                )

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two that are the same bytes."""
        return self.shape, tuple(self.parts.items())

    @property
    def unit(self) -> int:
        """Bytes of a value."""
        size = DTYPE_BYTES.get(self.dtype, 0)
        for extent in self.pairs:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.size_of(whole(self.shape))

    def image(self, block: Part, data: memoryview) -> Image:
        """A block, of whose bytes there are these."""
        return Image(data, self.dtype, (*block.sizes, *self.pairs))

    def size_of(self, block: Part) -> int:
        """Bytes of a block."""
        return volume(block) * self.unit

    def holding(self, pieces: Iterable[Part]) -> Iterator[Stored]:
        """The images that hold some of these."""
        for piece in pieces:
            for part, stored in self.parts.items():
                if overlap(part, piece) is not None:
                    yield stored

    def check_covers(self, block: Part) -> None:
        """Raise `CorruptCheckpointError` unless the parts hold all of a block."""
        shared = [overlap(part, block) for part in self.parts]
        covered = sum(volume(common) for common in shared if common is not None)
        if covered != volume(block):
            raise CorruptCheckpointError(
                f"the parts in which {self.name} was saved hold {covered} of the "
                f"{volume(block)} values at {list(block.offsets)}"
            )

    def runs(self, pieces: Iterable[Part], block: Part) -> Iterator[tuple[Stored, Runs]]:
        """Where the bytes of `pieces` of a block lie, and go to in the memory of the block."""
        for piece in pieces:
            for part, stored in self.parts.items():
                common = overlap(part, piece)
                if common is not None:
                    yield stored, runs_between(common, part, block, self.unit)


def joined_rows(name: str, blocks: Sequence[tuple[Stored, TensorEntry]]) -> StoredTensor:
    """Blocks of rows, the second behind the first and so on, as one tensor.

    Raises `CorruptCheckpointError` where they are no rows of one tensor.
    """
    parts: dict[Part, tuple[Stored, TensorEntry]] = {}
    rows = 0
    shape = blocks[0][1].shape
    for stored, entry in blocks:
        if len(entry.shape) != len(shape) or not entry.size:
            raise CorruptCheckpointError(
                f"{entry.key!r} of shape {entry.shape} is no row of {name}"
            )
        offsets = (rows, *(0,) * (len(shape) - 1))
        parts[Part(offsets, (entry.shape[0], *shape[1:]))] = stored, entry
        rows += entry.shape[0]
    return StoredTensor(name, (rows, *shape[1:]), parts)


class StoredReader:
    """Reads images of one checkpoint.

    Parameters
    ----------
    indexes
        Of all ranks that saved, in order.
    """

    def __init__(self, store: Store, layout: RunLayout, indexes: Sequence[Index]) -> None:
        self._store = store
        self._layout = layout
        self._indexes = indexes
        self._windows = WindowReader(store)
        self._checked: set[tuple[int, int]] = set()

    def entry(self, stored: Stored) -> TensorEntry:
        """The entry in the index of the rank that wrote it."""
        return self._indexes[stored.rank].tensors[stored.number]

    def path(self, stored: Stored) -> str:
        """Path of its file, from the store's root."""
        return self._layout.in_run(self.file(stored).path)

    def file(self, stored: Stored) -> FileEntry:
        return self._indexes[stored.rank].files[self.entry(stored).file]

    def check_files(self, images: Collection[Stored]) -> None:
        """Look at size and header of the files that hold these, of each once.

        To be done before memory is taken for what the entries say.

        Raises
        ------
        CorruptCheckpointError
            They are not what was committed.
        StoreError
            Storage failed.
        """
        files = {(stored.rank, self.entry(stored).file) for stored in images} - self._checked
        if not files:
            return
        for_each(files, self._check_file)
        self._checked |= files

    def read(self, wanted: Wanted) -> None:
        """Read and verify; every byte that has a target is there when this returns.

        Raises as `check_files`. What the targets hold is no value then.
        """
        images = list(wanted.items())
        chunks: dict[str, list[Chunk]] = {}
        for position, (stored, targets) in enumerate(images):
            needed = (pieces_with(target.runs, CHUNK_BYTES) for target in targets)
            numbers = sorted(set().union(*needed)) if targets else None
            found = chunks_of(position, self.entry(stored), numbers)
            chunks.setdefault(self.path(stored), []).extend(found)

        def load(task: tuple[str, Window]) -> None:
            for chunk, data in self._windows.read(*task):
                start = chunk.number * CHUNK_BYTES
                for target in images[chunk.position][1]:
                    copy_runs(target, start, data)

        for_each(
            ((path, window) for path in sorted(chunks) for window in windows(chunks[path])), load
        )

    def _check_file(self, file: tuple[int, int]) -> None:
        rank, number = file
        index = self._indexes[rank]
        members = [tensor for tensor in index.tensors if tensor.file == number]
        path = self._layout.in_run(index.files[number].path)
        check_header(self._store, path, index.files[number], members)
