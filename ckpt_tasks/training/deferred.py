"""Which tensors of a restore need not be read before it is known what takes them.

A value is made of the memory that its image was read into. Where nothing looks into that memory
before the value is placed, it may be read later, and only as far as it is needed then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ckpt_tasks.state.tracked import RESERVED_PREFIX

__all__ = ["defer_images", "without_device"]

_WRAPPED = frozenset(("index", "grad", "parameter"))
"""Members of a reference that say how a tensor is wrapped: its memory is the image's."""

_WALKED = frozenset(("tuple", "dict", "odict", "counter", "deque", "state_dict"))
"""Tags of containers that `state.placing` goes through; components of sparse tensors are computed
with, and no tensor in a set is ever placed."""


def defer_images(
    trees: Mapping[str, Any], optimizers: Collection[str], defers: Callable[[int], bool]
) -> tuple[dict[str, Any], set[int]]:
    """Trees to make values of, and the positions of images whose values may be read after that.

    Parameters
    ----------
    trees
        By tracked name; not trusted.
    optimizers
        Names that optimizers take. The device of their state is not looked at: it would be copied
        there unread, and they put it where their parameters are.
    defers
        Whether an image is worth it.
    """
    found: set[int] = set()
    needed_now: set[int] = set()
    for name, tree in trees.items():
        allowed = _WRAPPED | {"device"} if name in optimizers else _WRAPPED
        for position, members in _references(tree):
            waits = members <= allowed and not name.startswith(RESERVED_PREFIX)
            (found if waits else needed_now).add(position)
    waiting = {position for position in found - needed_now if defers(position)}
    rewritten = {
        name: without_device(tree, waiting) if name in optimizers else tree
        for name, tree in trees.items()
    }
    return rewritten, waiting


def _references(node: Any, *, is_walked: bool = True) -> Iterator[tuple[int, frozenset[str]]]:
    """Position and members of each reference, with one more for what stands where no walk goes."""
    if isinstance(node, list):
        for item in node:
            yield from _references(item, is_walked=is_walked)
    elif isinstance(node, dict) and node.get("$") == "tensor":
        reference = node.get("v")
        details = reference if isinstance(reference, dict) else {"index": reference}
        position = details.get("index")
        if type(position) is int:  # what is none is found to be damage when it is decoded
            yield position, frozenset(details) | (frozenset() if is_walked else {"not walked"})
    elif isinstance(node, dict):
        tag = node.get("$")
        is_walked = is_walked and (tag is None or (isinstance(tag, str) and tag in _WALKED))
        for value in node.values():
            yield from _references(value, is_walked=is_walked)


def without_device(node: Any, positions: Collection[int] | None = None) -> Any:
    """A copy of a tree whose references to these positions, or to all, say nothing of a device."""
    if isinstance(node, list):
        return [without_device(item, positions) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("v") if node.get("$") == "tensor" else None
    index = reference.get("index") if isinstance(reference, dict) else None
    if isinstance(reference, dict) and type(index) is int:
        if positions is not None and index not in positions:
            return node
        return {**node, "v": {key: v for key, v in reference.items() if key != "device"}}
    return {key: without_device(value, positions) for key, value in node.items()}
