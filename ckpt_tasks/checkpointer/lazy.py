"""Looking into a checkpoint without loading it: a tensor is read, and checked, when asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_tasks.checkpointer.reader import check_restorable, load_tensors, read_index
from ckpt_tasks.checkpointer.windows import Chunk, check_chunk, check_header
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.digest import chunk_spans
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, Index, TensorEntry
from ckpt_tasks.format.tree import decode_tree
from ckpt_tasks.store.base import Store

__all__ = ["LazyTensor", "open_checkpoint"]


def open_checkpoint(
    store: Store, layout: RunLayout, record: CommitRecord
) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of a checkpoint, by tracked name and then by the keys that lead to each.

    Only its index is read. Tensors that several names share stand under each of them.

    Returns
    -------
    dict
        ``["model"]["layer.weight"]``, ``["optimizer"]["state.0.exp_avg"]``; a tracked name
        without tensors is an empty dict. Usable as long as the store is open.

    Raises
    ------
    CorruptCheckpointError
        The index is damaged or missing, or does not fit the tensors.
    UnsupportedFormatError
        It was saved by several ranks.
    StoreError
        Storage failed.
    """
    check_restorable(layout, record)
    index = read_index(store, layout, record.indexes[0])
    files = _Files(store, layout, index)
    return {name: _lazy_tensors(files, name, tree) for name, tree in index.items.items()}


class LazyTensor:
    """A tensor that lies in a store.

    Parameters
    ----------
    dtype
        As safetensors spells it.
    shape, size
        Of what is stored, and its bytes.
    details
        What else the tree says of it, such as strides (see `state.tensors`).
    """

    __slots__ = ("_files", "_position", "details", "dtype", "shape", "size")

    def __init__(self, files: _Files, position: int, details: Mapping[str, Any]) -> None:
        entry = files.index.tensors[position]
        self.dtype = entry.dtype
        self.shape = tuple(entry.shape)
        self.size = entry.size
        self.details = details
        self._files = files
        self._position = position

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"

    def read(self) -> memoryview:
        """Its bytes, row-major; every one of them verified at the first call.

        Of a file on this machine it is mapped, and takes no memory but the page cache's. From
        elsewhere it is read into memory of its own, at each call.

        Raises
        ------
        CorruptCheckpointError
            It is not what was committed.
        StoreError
            Storage failed.
        """
        return self.read_private().toreadonly()

    def read_private(self) -> memoryview:
        """As `read`, and writable: what is written to it never reaches the file."""
        return self._files.bytes_of(self._position)


class _Files:
    """A checkpoint's files, mapped when first needed where the store can do that."""

    def __init__(self, store: Store, layout: RunLayout, index: Index) -> None:
        self.index = index
        self._store = store
        self._layout = layout
        self._mapped: dict[int, memoryview | None] = {}
        self._verified: set[int] = set()

    def bytes_of(self, position: int) -> memoryview:
        entry = self.index.tensors[position]
        mapped = self._map(entry.file)
        if mapped is None:
            return load_tensors(self._store, self._layout, self.index, {position})[position]
        if position not in self._verified:
            self._verify(position, entry, mapped)
            self._verified.add(position)
        return mapped[entry.offset : entry.offset + entry.size]

    def _map(self, number: int) -> memoryview | None:
        if number not in self._mapped:
            file = self.index.files[number]
            members = [tensor for tensor in self.index.tensors if tensor.file == number]
            path = self._path(number)
            check_header(self._store, path, file, members)
            mapped = self._store.map(path)
            # It may have changed between the two looks at it.
            if mapped is not None and mapped.nbytes != file.size:
                raise CorruptCheckpointError(f"{path} has {mapped.nbytes} bytes now")
            self._mapped[number] = mapped
        return self._mapped[number]

    def _verify(self, position: int, entry: TensorEntry, mapped: memoryview) -> None:
        path = self._path(entry.file)
        for number, (start, stop) in enumerate(chunk_spans(entry.size)):
            chunk = Chunk(position, entry, number, entry.offset + start, entry.offset + stop)
            check_chunk(path, chunk, mapped[chunk.start : chunk.stop])

    def _path(self, number: int) -> str:
        return self._layout.in_run(self.index.files[number].path)


def _lazy_tensors(files: _Files, name: str, tree: Any) -> dict[str, LazyTensor]:
    def leaf(tag: str, value: Any) -> object:
        if tag == "tensor":
            return _lazy_tensor(files, value)
        if tag == "state_dict":
            return value[0]
        # The components of a sparse tensor; of others, something that can be a dict's key.
        return value if tag == "sparse" else (tag, repr(value))

    found: dict[str, LazyTensor] = {}
    for path, tensor in _walk(decode_tree(tree, leaf=leaf), ()):
        key = text = ".".join(path) or name
        again = 1
        while key in found:
            again += 1
            key = f"{text}#{again}"
        found[key] = tensor
    return found


def _lazy_tensor(files: _Files, reference: Any) -> LazyTensor:
    details = reference if isinstance(reference, dict) else {"index": reference}
    position = details.get("index")
    if type(position) is not int or not 0 <= position < len(files.index.tensors):
        raise ValueError(f"{position!r} is no tensor's index")
    return LazyTensor(files, position, {k: v for k, v in details.items() if k != "index"})


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], LazyTensor]]:
    if isinstance(value, LazyTensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)))
    elif isinstance(value, (list, tuple, deque)):
        for number, item in enumerate(value):
            yield from _walk(item, (*path, str(number)))
