"""What ranks did not hold alike when they saved: values that a rank loses with its own trees."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint
from ckpt_tasks.format.digest import digest_of_chunks

__all__ = ["differing"]

_MANY = 20  # values that are named; the others are counted


def differing(checkpoint: ShardedCheckpoint, names: Collection[str] | None = None) -> list[str]:
    """Values that were not the same on all ranks, as ``model.bn.running_mean``.

    A rank that restores another's loses its own of these. Sharded tensors are none of them.

    Parameters
    ----------
    names
        Tracked names that are looked at; default: all.
    """
    comparison = _Comparison(checkpoint)
    first, found = checkpoint.indexes[0].items, dict[str, None]()
    for name in first if names is None else names:
        for rank in range(1, len(checkpoint.indexes)):
            other = checkpoint.indexes[rank].items.get(name)
            for path in comparison.differences(first.get(name), other, rank, name):
                found[path] = None
    listed = list(found)
    more = len(listed) - _MANY
    return [*listed[:_MANY], f"{more} more"] if more > 0 else listed


class _Comparison:
    def __init__(self, checkpoint: ShardedCheckpoint) -> None:
        self._checkpoint = checkpoint

    def differences(self, first: Any, other: Any, rank: int, path: str) -> Iterator[str]:
        """Paths at which rank 0's tree and that of `rank` differ."""
        tag = first.get("$") if isinstance(first, dict) else None
        if type(first) is not type(other) or (tag and tag != other.get("$")):
            yield path
        elif tag == "tensor":
            if self._digest(0, first["v"]) != self._digest(rank, other["v"]):
                yield path
        elif isinstance(first, dict | list) and tag != "sharded":
            mine, others = _named(first, tag, path), _named(other, tag, path)
            if [name for name, _ in mine] != [name for name, _ in others]:
                yield path
                return
            for (name, one), (_, two) in zip(mine, others, strict=True):
                yield from self.differences(one, two, rank, name)
        elif tag is None and first != other:
            yield path

    def _digest(self, rank: int, reference: Any) -> object:
        position = reference.get("index") if isinstance(reference, dict) else reference
        if type(position) is not int:
            return None
        return digest_of_chunks(self._checkpoint.chunks(rank, position))


def _named(node: Any, tag: str | None, path: str) -> list[tuple[str, Any]]:
    """A node's children with their paths, as people know them from the value itself."""
    if tag == "state_dict":
        return [(path, node["v"][0]), (f"{path}._metadata", node["v"][1])]
    if tag in ("dict", "odict", "counter"):
        return [(f"{path}.{key}", value) for key, value in node["v"]]
    if tag is not None:
        return [(path, node["v"])]
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    return [(f"{path}.{key}", value) for key, value in pairs]
