"""Tracked names as safetensors files, and as JSON what of them is no tensor. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ckpt_tasks.checkpointer.lazy import LazyTensor, LazyTrees
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_rank
from ckpt_tasks.checkpointer.streaming import stream_tensors
from ckpt_tasks.errors import ConfigError, StateError
from ckpt_tasks.format.layout import encode_name
from ckpt_tasks.format.safetensors import DTYPE_BYTES, TensorSpec, build_header
from ckpt_tasks.format.tree import Path as TreePath
from ckpt_tasks.format.tree import encode_tree, path_text
from ckpt_tasks.tasks.exporting import ExportRequest, ExportSource, chosen_names, module_names

__all__ = ["export_safetensors", "write_safetensors"]

_TENSOR_TAGS = frozenset(("tensor", "ndarray"))


def export_safetensors(source: ExportSource, request: ExportRequest, folder: Path) -> list[str]:
    """Make a folder with ``<name>.safetensors`` for each tracked name, and ``<name>.json``.

    A file holds whole tensors, whichever parts ranks saved, under the keys of the state dict; those
    of nested ones are joined by dots. Tensors that share their memory stand under each of their
    names, for `load_state_dict` asks for all; ``tied`` of the metadata says which they are. The
    JSON is there where state is no tensor (an optimizer's hyperparameters, counters): the tree of
    `format.tree`, in which ``{"$": "tensor", "v": KEY}`` names a tensor of the file.

    Of several ranks, it is rank 0's state.

    Raises
    ------
    ConfigError
        A form that has no module was asked for one, or no such name was tracked.
    StateError
        A tensor that safetensors has no dtype for, or a sparse one.

    and as `open_rank` and `stream_tensors`.
    """
    if request.model is not None:
        raise ConfigError("a model's code is for --to mlflow-model; safetensors has weights only")
    checkpoint = open_rank(source.store, source.layout, source.record, 0)
    trees = checkpoint.trees
    names = chosen_names(source.record, trees, request.only, module_names(trees))
    folder.mkdir()
    for name in names:
        write_safetensors(source, checkpoint, name, folder / encode_name(name))
    return names


def write_safetensors(
    source: ExportSource, checkpoint: ShardedCheckpoint, name: str, path: Path
) -> None:
    """Write what was tracked under one name, to `path` with ``.safetensors`` and ``.json`` added.

    Raises as `export_safetensors`.
    """
    found = _Tensors()
    value = LazyTrees(source.store, checkpoint).value(name, _Leaf)
    tree = encode_tree(value, path=(name,), leaf=found.leaf)
    described = {**source.described, "tracked": name}
    if found.tensors:
        _write_tensors(Path(f"{path}.safetensors"), checkpoint, found.tensors, described)
    if not found.tensors or _has_other_state(tree):
        content = msgspec.json.encode({**described, "state": tree})
        Path(f"{path}.json").write_bytes(msgspec.json.format(content, indent=1))


class _Leaf:
    """A leaf that is no tensor, as its tree says it."""

    def __init__(self, tag: str, value: Any) -> None:
        self.tag = tag
        self.value = value


class _Tensors:
    """Collects the tensors of a value under the keys that lead to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, LazyTensor] = {}

    def leaf(self, value: object, path: TreePath) -> tuple[str, object] | None:
        if isinstance(value, LazyTensor):
            return "tensor", self._add(value, path)
        if isinstance(value, _Leaf):
            if value.tag == "sparse":
                raise StateError(f"{path_text(path)} is sparse, {_NO_FORM}")
            return value.tag, value.value
        return None

    def _add(self, tensor: LazyTensor, path: TreePath) -> str:
        dtype = tensor.details.get("dtype")
        if dtype is not None:
            raise StateError(f"{path_text(path)} is a tensor of {dtype}, {_NO_FORM}")
        key = ".".join(map(str, path[1:])) or str(path[0])
        if key in self.tensors:
            raise StateError(f"two tensors of {path[0]} have the key {key!r} when joined by dots")
        self.tensors[key] = tensor
        return key


_NO_FORM = "for which safetensors has no form; export --to torch, or other names with --only"


def _write_tensors(
    path: Path,
    checkpoint: ShardedCheckpoint,
    tensors: Mapping[str, LazyTensor],
    described: Mapping[str, str],
) -> None:
    # Before room is taken for what entries say.
    checkpoint.reader.check_files(
        [stored for tensor in tensors.values() for stored in tensor.stored.parts.values()]
    )
    # Each then begins at a multiple of its own unit, as the library lays them out, too.
    keys = sorted(tensors, key=lambda key: -DTYPE_BYTES[tensors[key].dtype])
    specs = [TensorSpec(key, tensors[key].dtype, tensors[key].shape) for key in keys]
    metadata = {"format": "pt", **described, **_tied(tensors)}
    try:
        header = build_header(specs, metadata)
    except ValueError as error:
        raise StateError(f"{described['tracked']}: {error}") from error
    with path.open("xb", buffering=0) as file:
        file.write(header)
        for piece in stream_tensors(checkpoint, (tensors[key].stored for key in keys)):
            with piece:
                _write(file, piece)


def _write(file: Any, data: memoryview) -> None:
    """All of it: one call takes no more than 2 GiB, and may take less."""
    while data.nbytes:
        data = data[file.write(data) :]


def _tied(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Keys of tensors that share the memory of one before them, and that one's."""
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in tensors.items():
        if not tensor.size:
            continue
        known = first.setdefault(tensor.stored.identity, key)
        if known != key:
            tied[key] = known
    return {"tied": msgspec.json.encode(tied).decode()} if tied else {}


def _has_other_state(node: Any) -> bool:
    """Whether a tree has more than tensors and containers; keys are no state."""
    if isinstance(node, list):
        return any(map(_has_other_state, node))
    if not isinstance(node, dict):
        return True
    tag = node.get("$")
    if tag in _TENSOR_TAGS:
        return False
    if tag in ("dict", "odict", "counter"):
        return any(_has_other_state(item) for _, item in node["v"])
    return any(_has_other_state(item) for key, item in node.items() if key != "$")
