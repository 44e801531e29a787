"""Looking into a checkpoint without loading it: a tensor is read, and checked, when asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_rank
from ckpt_tasks.checkpointer.stored import Stored, StoredTensor
from ckpt_tasks.checkpointer.windows import check_chunk, chunks_of
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.blocks import whole
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.format.sharded import ShardedTensor
from ckpt_tasks.format.tree import decode_tree
from ckpt_tasks.store.base import Store

__all__ = ["LazyTensor", "LazyTrees", "open_checkpoint"]


def open_checkpoint(
    store: Store, layout: RunLayout, record: CommitRecord, *, rank: int = 0
) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of a checkpoint, by tracked name and then by the keys that lead to each.

    Only indexes are read. Tensors that several names share stand under each of them. Sharded ones
    are whole, whichever parts ranks saved of them, and what ranks hold alike is there once.

    Parameters
    ----------
    rank
        Whose state it is, where several saved. Ranks differ in what belongs to each alone: random
        generators, buffers that are not synchronised.

    Returns
    -------
    dict
        ``["model"]["layer.weight"]``, ``["optimizer"]["state.0.exp_avg"]``; a tracked name
        without tensors is an empty dict. Usable as long as the store is open.

    Raises
    ------
    ConfigError
        There is no such rank.
    CorruptCheckpointError
        An index is damaged or missing, or does not fit the tensors.
    StoreError
        Storage failed.
    """
    checkpoint = open_rank(store, layout, record, rank)
    trees = LazyTrees(store, checkpoint)
    return {name: _tensors_under(name, trees.value(name, _part_of)) for name in checkpoint.trees}


class LazyTensor:
    """A tensor that lies in a store.

    Parameters
    ----------
    dtype
        As safetensors spells it.
    shape, size
        Of what is stored, all parts together, and its bytes.
    details
        What else the tree says of it, such as strides (see `state.tensors`).
    stored
        Where it lies.
    """

    __slots__ = ("_files", "details", "dtype", "shape", "size", "stored")

    def __init__(self, files: _Files, tensor: StoredTensor, details: Mapping[str, Any]) -> None:
        self.dtype = tensor.dtype
        self.shape = (*tensor.shape, *tensor.pairs)
        self.size = tensor.nbytes
        self.details = details
        self.stored = tensor
        self._files = files

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"

    def read(self) -> memoryview:
        """Its bytes, row-major; every one of them verified at the first call.

        Of a file on this machine it is mapped, and takes no memory but the page cache's. From
        elsewhere, and where it was saved in several parts, it is read into memory of its own, at
        each call.

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
        return self._files.bytes_of(self.stored)


class _Files:
    """A checkpoint's files, mapped when first needed where the store can do that."""

    def __init__(self, store: Store, checkpoint: ShardedCheckpoint) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._reader = checkpoint.reader
        self._mapped: dict[str, memoryview | None] = {}
        self._verified: set[Stored] = set()

    def bytes_of(self, tensor: StoredTensor) -> memoryview:
        everything = whole(tensor.shape)
        alone = tensor.parts.get(everything)
        mapped = None if alone is None else self._map(alone)
        if alone is None or mapped is None:
            return self._checkpoint.read([(tensor, everything)])[0].data
        entry = self._reader.entry(alone)
        if alone not in self._verified:
            path = self._reader.path(alone)
            for chunk in chunks_of(0, entry):
                check_chunk(path, chunk, mapped[chunk.start : chunk.stop])
            self._verified.add(alone)
        return mapped[entry.offset : entry.offset + entry.size]

    def _map(self, stored: Stored) -> memoryview | None:
        """The file that holds an image."""
        self._reader.check_files([stored])
        path, file = self._reader.path(stored), self._reader.file(stored)
        if path not in self._mapped:
            mapped = self._store.map(path)
            # It may have changed between the two looks at it.
            if mapped is not None and mapped.nbytes != file.size:
                raise CorruptCheckpointError(f"{path} has {mapped.nbytes} bytes now")
            self._mapped[path] = mapped
        return self._mapped[path]


class LazyTrees:
    """The trees of one rank's state, with tensors that are read when they are asked for.

    Parameters
    ----------
    checkpoint
        Opened for the rank whose state it is.
    """

    def __init__(self, store: Store, checkpoint: ShardedCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._files = _Files(store, checkpoint)

    def value(self, name: str, other: Callable[[str, Any], object]) -> Any:
        """What was saved under a tracked name, with a `LazyTensor` for each tensor.

        Parameters
        ----------
        other
            Gives what stands for a leaf of another kind, from its tag and what it holds. It must
            be hashable, where the leaf may be a dict's key.

        Raises `CorruptCheckpointError` for a tree that `capture` does not write.
        """
        tree = self._checkpoint.trees[name]
        numbered, sharded = self._checkpoint.leaves().numbered(name, tree)

        def leaf(tag: str, value: Any) -> object:
            if tag == "tensor":
                return self._plain(value)
            if tag == "sharded" and type(value) is int:
                return self._sharded(sharded[value])
            return value[0] if tag == "state_dict" else other(tag, value)

        return decode_tree(numbered, leaf=leaf)

    def _plain(self, reference: Any) -> LazyTensor:
        details = reference if isinstance(reference, dict) else {"index": reference}
        position = details.get("index")
        if type(position) is not int:
            raise ValueError(f"{position!r} is no tensor's index")
        tensor = self._checkpoint.image_at(self._checkpoint.source_rank, position)
        return LazyTensor(self._files, tensor, {k: v for k, v in details.items() if k != "index"})

    def _sharded(self, sharded: ShardedTensor) -> LazyTensor:
        tensor = self._checkpoint.tensor_of(sharded)
        tensor.check_covers(whole(tensor.shape))
        # Strides are those of one part.
        kept = ("dtype",) if len(sharded.parts) > 1 else ("dtype", "stride")
        details = {k: v for k, v in sharded.parts[0].details.items() if k in kept}
        if sharded.is_parameter:
            details["parameter"] = True
        if sharded.requires_grad:
            details["grad"] = True
        return LazyTensor(self._files, tensor, details)


def _part_of(tag: str, value: Any) -> object:
    # The components of a sparse tensor; of others, something that can be a dict's key.
    return value if tag == "sparse" else (tag, repr(value))


def _tensors_under(name: str, value: Any) -> dict[str, LazyTensor]:
    """Those of a tracked name, by the keys that lead to each."""
    found: dict[str, LazyTensor] = {}
    for path, tensor in _walk(value, ()):
        key = text = ".".join(path) or name
        again = 1
        while key in found:
            again += 1
            key = f"{text}#{again}"
        found[key] = tensor
    return found


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], LazyTensor]]:
    if isinstance(value, LazyTensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)))
    elif isinstance(value, (list, tuple, deque)):
        for number, item in enumerate(value):
            yield from _walk(item, (*path, str(number)))
