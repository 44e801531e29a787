"""Capture: the state of tracked objects as JSON trees and tensor images; and back.

Capturing reads, and changes nothing: it draws no random number, steps no optimizer, and copies
no CPU tensor that is row-major already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.format.records import RowBlocks, SharedTensor
from ckpt_tasks.format.tree import Path, SamePath, decode_tree, encode_tree
from ckpt_tasks.garbage import without_collection
from ckpt_tasks.state import arrays, sharding, sparse
from ckpt_tasks.state.health import find_nonfinite
from ckpt_tasks.state.modules import canonical_state_dict, parameter_names
from ckpt_tasks.state.optimizers import optimizer_state_dict
from ckpt_tasks.state.restored import ReadImages, RestoredValues
from ckpt_tasks.state.row_blocks import RowSplitter, split_rows
from ckpt_tasks.state.staging import copy_images
from ckpt_tasks.state.tensors import (
    Memory,
    TensorImage,
    check_supported,
    image_of,
    named_device,
    plain_memory,
    reference_details,
    row_major_strides,
    values_from_image,
    with_autograd,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["CapturedState", "capture", "is_stateful", "restore_values"]

_RESERVED_KEYS = frozenset(("__metadata__",))


class CapturedState:
    """The state of several tracked objects at one moment.

    Parameters
    ----------
    trees
        Each tracked name's typed JSON tree. A tensor in it is ``{"$": "tensor", "v": reference}``
        (see `state.tensors`), by index into `tensors`.
    tensors
        The tensors to write, each memory once, those of modules first.
    row_blocks
        Tensors that are written as several of these, which the trees refer to by the first.
    """

    __slots__ = ("row_blocks", "tensors", "trees")

    def __init__(
        self,
        trees: dict[str, Any],
        tensors: list[TensorImage],
        row_blocks: Sequence[RowBlocks] = (),
    ) -> None:
        self.trees = trees
        self.tensors = tensors
        self.row_blocks = row_blocks

    @property
    def shared(self) -> Sequence[SharedTensor]:
        """What another rank writes: nothing, where this state has not been divided."""
        return ()

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        """Copy each tensor's bytes, row-major, to its offset in `buffer`."""
        copy_images(self.tensors, buffer, offsets)

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        """Nothing is left to be copied; see `state.overlap` for where that is otherwise."""
        return 0.0

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        """Names of modules' parameters that hold NaN or infinity, as they were copied."""
        return find_nonfinite(self.tensors, buffer, offsets)


def is_stateful(value: object) -> bool:
    """Whether `value` is an object (no class) with ``state_dict`` and ``load_state_dict``."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def capture(items: Mapping[str, Any], splitter: RowSplitter | None = None) -> CapturedState:
    """Capture objects that have a state dict, and plain values.

    Parameters
    ----------
    items
        Tracked name to object.
    splitter
        Knows which tensors are to be written in blocks of rows; default: none.

    Returns
    -------
    CapturedState
        Its CPU tensors share memory with the live ones: copy them before training goes on.

    Raises
    ------
    StateError
        What cannot be represented, naming path and type.
    ConfigError
        A tensor is to be split that cannot be.
    """
    collector = _Collector(splitter or RowSplitter())
    # Tensors that several items share are stored with the first; weights belong to the module.
    by_module = sorted(items, key=lambda name: not isinstance(items[name], torch.nn.Module))
    with without_collection():
        trees = {name: collector.tree(name, items[name]) for name in by_module}
    return CapturedState(
        {name: trees[name] for name in items}, collector.images, collector.row_blocks
    )


def restore_values(
    trees: Mapping[str, Any],
    tensor_at: Callable[[int], torch.Tensor],
    sharded_at: Callable[[int], object] | None = None,
    *,
    read: ReadImages = lambda wanted: None,
) -> RestoredValues:
    """State dicts and plain values, from their trees.

    Parameters
    ----------
    trees
        As in `CapturedState`, from an index; not trusted.
    tensor_at
        Gives the tensor of an index, as stored (see `tensors.tensor_from_buffer`). It is called
        once for each, and its memory is used. Tensors that shared memory when they were
        captured come back as one object.
    sharded_at
        Gives the value of a sharded tensor, by the number that stands in its leaf (see
        `format.sharded`).
    read
        Of `RestoredValues`.

    Raises
    ------
    CorruptCheckpointError
        Trees that `capture` does not write.
    """
    restorer = _Restorer(tensor_at, sharded_at)
    values = RestoredValues(restorer.index_of, read)
    for name, tree in trees.items():
        try:
            values[name] = decode_tree(tree, leaf=restorer.leaf)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{name}: {error}") from error
    return values


class _Collector:
    def __init__(self, splitter: RowSplitter) -> None:
        self.images: list[TensorImage] = []
        self.row_blocks: list[RowBlocks] = []
        self._splitter = splitter
        self._asked_for: set[int] = set()
        self._index_of: dict[object, int] = {}
        self._alive: list[torch.Tensor] = []
        self._item = ""
        self._keys: set[str] = set()
        self._with_device = False
        self._parameters: frozenset[str] = frozenset()

    def tree(self, name: str, item: Any) -> Any:
        self._item = name
        self._keys = set(_RESERVED_KEYS)
        # A module's tensors are copied to where the live ones are; others have only themselves.
        self._with_device = not isinstance(item, torch.nn.Module)
        self._parameters = frozenset() if self._with_device else parameter_names(item)
        return encode_tree(_state_of(item), path=(name,), leaf=self.leaf)

    def leaf(self, value: object, path: Path) -> tuple[str, object] | None:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if type(value) is OrderedDict and hasattr(value, "_metadata"):
            return "state_dict", SamePath((dict(value), value._metadata))
        if isinstance(value, torch.dtype):
            return "dtype", str(value).removeprefix("torch.")
        if isinstance(value, torch.device):
            return "device", str(value)
        if isinstance(value, torch.Size):
            return "size", list(value)
        return arrays.encode(value)

    def _tensor(self, tensor: torch.Tensor, path: Path) -> tuple[str, object]:
        plain = plain_memory(tensor)
        if plain is not None:
            return "tensor", self._index(tensor, path, plain)
        if sharding.is_dtensor(tensor):
            return self._sharded(tensor, path)
        check_supported(tensor, path)
        if tensor.layout is not torch.strided:
            self._alive.append(tensor)
            return "sparse", sparse.decompose(tensor, path)
        details = reference_details(tensor, with_device=self._with_device)
        index = self._index(tensor, path)
        return "tensor", {"index": index, **details} if details else index

    def _sharded(self, tensor: DTensor, path: Path) -> tuple[str, object]:
        self._splitter.refuse_if_asked(
            path, "a DTensor, whose parts are saved as the ranks hold them; leave it out"
        )
        part, local, leaf = sharding.decompose(tensor, path)
        if part is not None and local is not None:
            check_supported(local, path)
            index = self._index(local, path)
            self.images[index].part, self.images[index].source = part, tensor
        return "sharded", leaf

    def _index(
        self, tensor: torch.Tensor, path: Path, plain: tuple[str, Memory] | None = None
    ) -> int:
        identity = plain[1] if plain is not None else _identity(tensor)
        index = self._index_of.get(identity)
        asked_for = self._splitter.asks_for(path)
        if index is None:
            index = self._index_of[identity] = len(self.images)
            # An address names a tensor only as long as the tensor lives.
            self._alive.append(tensor)
            dtype, data = (plain[0], tensor) if plain is not None else image_of(tensor, path)
            key = self._unique_key(".".join(map(str, path[1:])) or self._item)
            image = TensorImage(self._item, key, dtype, tuple(data.shape), data)
            image.is_parameter = path[-1] in self._parameters
            self.images += self._split(image) if asked_for else [image]
            if asked_for:
                self._asked_for.add(index)
        elif asked_for and index not in self._asked_for:
            first = self.images[index].name
            self._splitter.refuse_if_asked(path, f"whose memory is that of {first}; name that")
        return index

    def _split(self, image: TensorImage) -> list[TensorImage]:
        """An image's blocks of rows, which are to follow those that there are."""
        places = list(split_rows(image))
        if len(places) < 2:
            return [image]
        blocks = [
            image.rows(start, stop, self._unique_key(f"{image.key}[{start}:{stop}]"))
            for start, stop in places
        ]
        self.row_blocks.append(
            RowBlocks(key=image.key, position=len(self.images), count=len(blocks))
        )
        return blocks

    def _unique_key(self, text: str) -> str:
        if not text.isascii():
            text = text.encode("utf-8", "backslashreplace").decode()
        key = text
        again = 1
        while key in self._keys:
            again += 1
            key = f"{text}#{again}"
        self._keys.add(key)
        return key


def _state_of(item: Any) -> Any:
    if isinstance(item, torch.nn.Module):
        return canonical_state_dict(item)
    if isinstance(item, torch.optim.Optimizer):
        return optimizer_state_dict(item)
    return item.state_dict() if is_stateful(item) else item


def _identity(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are the same values in the same memory, as `Memory` is."""
    if tensor.numel() == 0:
        return id(tensor)
    memory = (tensor.data_ptr(), tensor.dtype, tensor.shape)
    details = (
        None if tensor.is_cpu else tensor.device,
        None if tensor.stride() == row_major_strides(tensor.shape) else tensor.stride(),
        (tensor.is_conj(), tensor.is_neg()),
    )
    return memory if details == _NO_DETAILS else (*memory, *details)


_NO_DETAILS = (None, None, (False, False))


class _Restorer:
    def __init__(
        self,
        tensor_at: Callable[[int], torch.Tensor],
        sharded_at: Callable[[int], object] | None,
    ) -> None:
        self._tensor_at = tensor_at
        self._sharded_at = sharded_at
        self._images: dict[int, torch.Tensor] = {}
        self._values: dict[object, torch.Tensor] = {}
        self._tensors: dict[object, torch.Tensor] = {}
        self.index_of: dict[int, int] = {}

    def leaf(self, tag: str, value: Any) -> object:
        decode = _DECODERS.get(tag)
        if decode is not None:
            return decode(value)
        try:
            if tag == "tensor":
                return self._tensor(value)
            if tag == "sparse":
                return self._sparse(value)
            if tag == "sharded" and self._sharded_at is not None and type(value) is int:
                return self._sharded_at(value)
            return arrays.decode(tag, value)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def _tensor(self, reference: object) -> torch.Tensor:
        tensor = self._referenced(reference)
        index = reference if type(reference) is int else reference["index"]  # type: ignore[index]
        self.index_of[id(tensor)] = index
        return tensor

    def _referenced(self, reference: object) -> torch.Tensor:
        if type(reference) is int:
            return self._image(reference)
        if not isinstance(reference, dict) or not _MEMBERS.issuperset(reference):
            raise ValueError(f"{reference!r} is no reference to a tensor")
        index, details = reference.get("index"), reference
        memory = (index, repr([details.get(member) for member in ("dtype", "stride", "device")]))
        if memory not in self._values:
            self._values[memory] = values_from_image(self._image(index), details)
        wrapped = (*memory, bool(details.get("grad")), bool(details.get("parameter")))
        if wrapped not in self._tensors:
            self._tensors[wrapped] = with_autograd(self._values[memory], details)
        return self._tensors[wrapped]

    def _image(self, index: object) -> torch.Tensor:
        if type(index) is not int or index < 0:
            raise ValueError(f"{index!r} is no index of a tensor")
        if index not in self._images:
            self._images[index] = self._tensor_at(index)
        return self._images[index]

    def _sparse(self, parts: Any) -> torch.Tensor:
        identity = sparse.identity(parts)
        if identity not in self._tensors:
            self._tensors[identity] = sparse.compose(parts)
        return self._tensors[identity]


_MEMBERS = frozenset(("index", "dtype", "stride", "device", "grad", "parameter"))


def _decode_state_dict(value: Any) -> Any:
    content, metadata = value
    if not isinstance(content, dict) or not isinstance(metadata, dict):
        raise TypeError("a state dict has no dict of values and metadata")
    state: Any = OrderedDict(content)
    state._metadata = metadata
    return state


def _decode_dtype(value: Any) -> torch.dtype:
    # Not getattr: it imports modules by name.
    found = vars(torch).get(value) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{value!r} is no dtype")
    return found


_DECODERS: dict[str, Callable[[Any], object]] = {
    "state_dict": _decode_state_dict,
    "dtype": _decode_dtype,
    "device": named_device,
    "size": torch.Size,
}
