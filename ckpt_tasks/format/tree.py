"""The typed JSON tree: values of Python as JSON, exactly, and back, without pickle.

What JSON spells by itself stays as it is, so that an index can be read by people: ``None``,
booleans, finite floats, integers of 64 bits, text, lists, and dicts whose keys are text. All
else is a **tagged node**, an object of two members: ``{"$": "tuple", "v": [1, 2]}``.

====================  ============================================================
tag                   ``v``
====================  ============================================================
tuple                 list of nodes
dict, odict, counter  list of ``[key node, value node]``, in order
set, frozenset        list of nodes, in an order that depends on the values alone
deque                 ``[list of nodes, maxlen or null]``
int                   hexadecimal text, for what does not fit in 64 bits
float                 ``nan``, ``inf``, ``-inf``, or the 8 bytes of another NaN in hexadecimal
complex               ``[real node, imaginary node]``
bytes, bytearray      base64
text                  base64 of UTF-8 with surrogates, for text that is no valid Unicode
range, slice          ``[start, stop, step]``
====================  ============================================================

Other tags belong to the caller's `leaf`. A container that occurs twice comes back as two equal
containers; only what a leaf handles (tensors) can keep its identity.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from ckpt_tasks.errors import CorruptCheckpointError, StateError
from ckpt_tasks.format.scalars import (
    DECODERS,
    ENCODERS,
    TAG,
    TAGGED,
    VALUE,
    is_unicode,
    parts_of,
    tagged,
    text_of,
)

__all__ = ["MAX_DEPTH", "Path", "SamePath", "decode_tree", "encode_tree", "path_text"]

MAX_DEPTH = 64
"""Containers within containers; a state that is deeper is taken for one that has no end."""

Path = tuple[object, ...]
"""The tracked name, then the keys and indices that lead from it to a value."""


class SamePath(tuple[object, ...]):
    """A leaf's value in several parts, a list in the tree, each at the path of the leaf itself."""

    __slots__ = ()


EncodeLeaf = Callable[[object, Path], "tuple[str, object] | None"]
DecodeLeaf = Callable[[str, object], object]


def path_text(path: Path) -> str:
    """A path as Python spells it: ``optimizer['state'][0]['exp_avg']``."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def encode_tree(value: object, *, path: Path, leaf: EncodeLeaf) -> Any:
    """Turn a value into its typed JSON tree.

    Parameters
    ----------
    value
        What to encode.
    path
        Where it belongs, for messages; the tracked name first.
    leaf
        Called with an object that JSON does not spell, and its path. It returns a tag and a
        value, which is encoded in turn, or ``None`` for what it does not know.

    Returns
    -------
    Any
        ``None``, a boolean, number, text, list or dict that any JSON encoder takes.

    Raises
    ------
    StateError
        A type that is not known, a cycle, or too deep a nesting; names the path and the type.
    """
    try:
        return _Encoder(leaf).encode(value, path)
    except RecursionError as error:
        raise StateError(f"{path_text(path)} is nested too deeply to be saved") from error


def decode_tree(node: object, *, leaf: DecodeLeaf) -> Any:
    """Turn a tree back into the value; the inverse of `encode_tree`.

    Parameters
    ----------
    node
        The tree, as a JSON decoder returned it. It is not trusted.
    leaf
        Called with a tag that is not listed above, and its decoded value. It raises
        ``ValueError``, ``TypeError``, ``LookupError`` or ``OverflowError`` for what it refuses.

    Raises
    ------
    CorruptCheckpointError
        Anything that `encode_tree` does not write.
    """
    try:
        return _Decoder(leaf).decode(node, 0)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise CorruptCheckpointError(f"the saved state is damaged: {error}") from error


class _Encoder:
    def __init__(self, leaf: EncodeLeaf) -> None:
        self._leaf = leaf
        self._open: set[int] = set()

    def encode(self, value: object, path: Path) -> Any:
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        scalar = ENCODERS.get(kind)
        if scalar is not None:
            return scalar(value)
        if kind not in _PLAIN_CONTAINERS:
            found = self._leaf(value, path)
            if found is not None:
                return tagged(found[0], self._leaf_value(found[1], path))
        container = _CONTAINERS.get(kind)
        if container is None:
            raise StateError(_refusal(value, path))
        return self._nested(container, value, path)

    def _leaf_value(self, value: object, path: Path) -> Any:
        if type(value) is SamePath:
            return [self.encode(part, path) for part in value]
        return self.encode(value, path)

    def _nested(self, container: Callable[..., Any], value: object, path: Path) -> Any:
        if id(value) in self._open:
            raise StateError(f"{path_text(path)} contains itself and cannot be saved")
        if len(self._open) >= MAX_DEPTH:
            raise StateError(
                f"{path_text(path[:4])}… is nested more than {MAX_DEPTH} levels deep; flatten it"
            )
        self._open.add(id(value))
        try:
            return container(self, value, path)
        finally:
            self._open.discard(id(value))

    def encode_list(self, value: list[object], path: Path) -> Any:
        return [self.encode(item, (*path, i)) for i, item in enumerate(value)]

    def encode_tuple(self, value: tuple[object, ...], path: Path) -> Any:
        return tagged("tuple", [self.encode(item, (*path, i)) for i, item in enumerate(value)])

    def encode_dict(self, value: dict[object, object], path: Path) -> Any:
        if TAG not in value and all(type(key) is str and is_unicode(key) for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return tagged("dict", self._pairs(value, path))

    def encode_ordered_dict(self, value: OrderedDict[object, object], path: Path) -> Any:
        return tagged("odict", self._pairs(value, path))

    def encode_counter(self, value: Counter[object], path: Path) -> Any:
        return tagged("counter", self._pairs(value, path))

    def _pairs(self, value: Any, path: Path) -> list[Any]:
        return [
            [self.encode(key, (*path, key)), self.encode(item, (*path, key))]
            for key, item in value.items()
        ]

    def encode_set(self, value: set[object], path: Path) -> Any:
        return tagged("set", self._members(value, path))

    def encode_frozenset(self, value: frozenset[object], path: Path) -> Any:
        return tagged("frozenset", self._members(value, path))

    def _members(self, value: Any, path: Path) -> list[Any]:
        # Text hashes differ between processes: without an order of its own the same set would
        # have another digest in every attempt.
        return sorted((self.encode(item, (*path, item)) for item in value), key=repr)

    def encode_deque(self, value: deque[object], path: Path) -> Any:
        items = [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        return tagged("deque", [items, value.maxlen])

    def encode_slice(self, value: slice, path: Path) -> Any:
        parts = (value.start, value.stop, value.step)
        return tagged("slice", [self.encode(part, path) for part in parts])


_PLAIN_CONTAINERS = frozenset((list, tuple, dict))
_CONTAINERS: dict[type, Callable[..., Any]] = {
    list: _Encoder.encode_list,
    tuple: _Encoder.encode_tuple,
    dict: _Encoder.encode_dict,
    OrderedDict: _Encoder.encode_ordered_dict,
    Counter: _Encoder.encode_counter,
    set: _Encoder.encode_set,
    frozenset: _Encoder.encode_frozenset,
    deque: _Encoder.encode_deque,
    slice: _Encoder.encode_slice,
}


def _refusal(value: object, path: Path) -> str:
    kind = type(value)
    return (
        f"{path_text(path)} is a {kind.__module__}.{kind.__qualname__}, which cannot be saved "
        "without pickle; turn it into plain values (numbers, text, lists, dicts, tensors), or "
        "give the object that holds it state_dict() and load_state_dict()"
    )


class _Decoder:
    def __init__(self, leaf: DecodeLeaf) -> None:
        self._leaf = leaf

    def decode(self, node: object, depth: int) -> Any:
        kind = type(node)
        if kind is list or kind is dict:
            # One level of a tagged container takes up to four levels of JSON.
            if depth > 4 * MAX_DEPTH:
                raise ValueError("nested too deeply")
            return self._list(node, depth + 1) if kind is list else self._dict(node, depth + 1)
        if kind not in _JSON_SCALARS:
            raise ValueError(f"a {kind.__name__} is not JSON")
        return node

    def _list(self, node: Any, depth: int) -> list[Any]:
        return [self.decode(item, depth) for item in node]

    def _dict(self, node: Any, depth: int) -> Any:
        if TAG not in node:
            return {text_of(key): self.decode(item, depth) for key, item in node.items()}
        tag = node[TAG]
        if node.keys() != TAGGED or type(tag) is not str:
            raise ValueError(f"a tagged node has the members {sorted(map(str, node))}")
        scalar = DECODERS.get(tag)
        if scalar is not None:
            return scalar(node[VALUE])
        container = _CONTAINER_TAGS.get(tag)
        if container is not None:
            return container(self, node[VALUE], depth)
        return self._leaf(tag, self.decode(node[VALUE], depth))

    def items(self, node: object, depth: int) -> list[Any]:
        if type(node) is not list:
            raise ValueError(f"a list was expected, not a {type(node).__name__}")
        return self._list(node, depth + 1)

    def decode_tuple(self, node: object, depth: int) -> Any:
        return tuple(self.items(node, depth))

    def decode_dict(self, node: object, depth: int) -> Any:
        return self._pairs({}, node, depth)

    def decode_ordered_dict(self, node: object, depth: int) -> Any:
        return self._pairs(OrderedDict(), node, depth)

    def decode_counter(self, node: object, depth: int) -> Any:
        return self._pairs(Counter(), node, depth)

    def _pairs(self, target: Any, node: object, depth: int) -> Any:
        for pair in self.items(node, depth):
            if type(pair) is not list or len(pair) != 2:
                raise ValueError("a dict's entry is no pair")
            key, item = pair
            if key in target:
                raise ValueError(f"a dict has the key {key!r} twice")
            target[key] = item
        return target

    def decode_set(self, node: object, depth: int) -> Any:
        return set(self._distinct(node, depth))

    def decode_frozenset(self, node: object, depth: int) -> Any:
        return frozenset(self._distinct(node, depth))

    def _distinct(self, node: object, depth: int) -> list[Any]:
        items = self.items(node, depth)
        if len(frozenset(items)) != len(items):
            raise ValueError("a set has an element twice")
        return items

    def decode_deque(self, node: object, depth: int) -> Any:
        items, maxlen = parts_of(node, 2)
        if maxlen is not None and type(maxlen) is not int:
            raise ValueError(f"a deque's maxlen is {maxlen!r}")
        items = self.items(items, depth)
        if maxlen is not None and len(items) > maxlen:
            raise ValueError(f"a deque of at most {maxlen} has {len(items)} items")
        return deque(items, maxlen)

    def decode_slice(self, node: object, depth: int) -> Any:
        return slice(*self.items(parts_of(node, 3), depth))


_JSON_SCALARS = frozenset((type(None), bool, int, float, str))
_CONTAINER_TAGS: dict[str, Callable[..., Any]] = {
    "tuple": _Decoder.decode_tuple,
    "dict": _Decoder.decode_dict,
    "odict": _Decoder.decode_ordered_dict,
    "counter": _Decoder.decode_counter,
    "set": _Decoder.decode_set,
    "frozenset": _Decoder.decode_frozenset,
    "deque": _Decoder.decode_deque,
    "slice": _Decoder.decode_slice,
}
