"""The typed JSON tree keeps values exactly, and survives anything that pretends to be one."""

from __future__ import annotations

import collections
import contextlib
import enum
import math
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tasks.errors import CorruptCheckpointError, StateError
from ckpt_tasks.format.tree import MAX_DEPTH, SamePath, decode_tree, encode_tree


class Leaf:
    """Stands for an object that only the caller's leaf knows."""

    def __init__(self, value: object) -> None:
        self.value = value


def encode_leaf(value: object, path: tuple[object, ...]) -> tuple[str, object] | None:
    return ("leaf", value.value) if isinstance(value, Leaf) else None


def decode_leaf(tag: str, value: object) -> object:
    if tag != "leaf":
        raise ValueError(f"unknown tag {tag!r}")
    return Leaf(value)


def encode(value: object) -> Any:
    return encode_tree(value, path=("item",), leaf=encode_leaf)


def decode(node: object) -> Any:
    return decode_tree(node, leaf=decode_leaf)


def through_json(value: object) -> Any:
    return decode(msgspec.json.decode(msgspec.json.encode(encode(value))))


def exact(value: Any) -> Any:
    """A comparable image of a value that tells 1 from 1.0 and True, 0.0 from -0.0, and orders."""
    kind = type(value).__name__
    if isinstance(value, float):
        return (kind, struct.pack(">d", value))
    if isinstance(value, complex):
        return (kind, exact(value.real), exact(value.imag))
    if isinstance(value, dict):
        return (kind, [(exact(key), exact(item)) for key, item in value.items()])
    if isinstance(value, (set, frozenset)):
        return (kind, sorted((exact(item) for item in value), key=repr))
    if isinstance(value, deque):
        return (kind, value.maxlen, [exact(item) for item in value])
    if isinstance(value, slice):
        return (kind, [exact(part) for part in (value.start, value.stop, value.step)])
    if isinstance(value, (list, tuple)):
        return (kind, [exact(item) for item in value])
    return (kind, value)


any_text = st.text(st.characters(exclude_categories=()), max_size=8)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**80), max_value=2**80),
    st.floats(allow_nan=True, allow_infinity=True),
    st.complex_numbers(allow_nan=True, allow_infinity=True),
    any_text,
    st.binary(max_size=8),
    st.binary(max_size=8).map(bytearray),
    st.builds(range, st.integers(), st.integers(), st.integers(min_value=1)),
)
keys = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), any_text, st.sampled_from(["$", "v"])
    ),
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=4).map(Counter),
        st.lists(inner, max_size=4).map(deque),
        st.lists(inner, max_size=4).map(lambda items: deque(items, maxlen=4)),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
        st.tuples(inner, inner, inner).map(lambda parts: slice(*parts)),
    )


values = st.recursive(scalars, containers, max_leaves=24)


@settings(max_examples=400, deadline=None)
@given(values)
def test_any_value_comes_back_exactly(value: Any) -> None:
    """What goes through JSON comes back with the same types, order, signs and NaN payloads."""
    assert exact(through_json(value)) == exact(value)


@settings(max_examples=100, deadline=None)
@given(values)
def test_a_tree_is_its_own_normal_form(value: Any) -> None:
    """Encoding what was decoded gives the same tree, so that digests are stable."""
    tree = encode(value)
    assert encode(decode(tree)) == tree or "nan" in repr(tree)


TAGS = [
    *("tuple", "dict", "odict", "counter", "set", "frozenset", "deque", "int", "float"),
    *("complex", "bytes", "bytearray", "text", "range", "slice", "leaf", "pickle"),
]
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.fixed_dictionaries(
            {
                "$": st.one_of(
                    inner,
                    st.sampled_from(TAGS),
                ),
                "v": st.one_of(inner, st.lists(st.lists(inner, min_size=2, max_size=2))),
            }
        ),
    ),
    max_leaves=20,
)


@settings(max_examples=600, deadline=None)
@given(json_values)
def test_hostile_json_raises_nothing_but_corrupt(node: Any) -> None:
    """Any JSON either decodes or raises CorruptCheckpointError."""
    with contextlib.suppress(CorruptCheckpointError):
        decode(node)


@pytest.mark.parametrize(
    "node",
    [
        {"$": "pickle", "v": "gASVAAAA"},
        {"$": "tuple"},
        {"$": "tuple", "v": [], "x": 1},
        {"$": ["tuple"], "v": []},
        {"$": "tuple", "v": 3},
        {"$": "dict", "v": [[1, 2, 3]]},
        {"$": "dict", "v": [[1, 2], [1.0, 3]]},
        {"$": "dict", "v": [[[], 2]]},
        {"$": "set", "v": [1, True]},
        {"$": "set", "v": [{}]},
        {"$": "deque", "v": [[1, 2], 1]},
        {"$": "deque", "v": [[], -1]},
        {"$": "deque", "v": [[], 10**30]},
        {"$": "deque", "v": [[], True]},
        {"$": "int", "v": "0x"},
        {"$": "int", "v": 3},
        {"$": "float", "v": "1.5"},
        {"$": "float", "v": "7ff8"},
        {"$": "float", "v": "3ff0000000000000"},
        {"$": "complex", "v": [1, 2]},
        {"$": "bytes", "v": "§"},
        {"$": "text", "v": "/w=="},
        {"$": "range", "v": [0, 1, 0]},
        {"$": "range", "v": [0.0, 1, 1]},
        {"$": "slice", "v": [1, 2]},
        {"$": "leaf2", "v": 0},
        b"not json",
    ],
)
def test_malformed_nodes_are_refused(node: Any) -> None:
    """Unknown tags, wrong members and impossible values raise CorruptCheckpointError."""
    with pytest.raises(CorruptCheckpointError):
        decode(node)


@pytest.mark.parametrize("wrap", [lambda node: [node], lambda node: {"$": "tuple", "v": [node]}])
def test_endless_nesting_is_refused_without_overflowing_the_stack(wrap: Any) -> None:
    """Nesting of any depth raises CorruptCheckpointError, never RecursionError."""
    node: Any = 0
    for _ in range(100_000):
        node = wrap(node)
    with pytest.raises(CorruptCheckpointError):
        decode(node)
    while isinstance(node, (list, dict)):  # a chain this long must not be freed recursively
        node = node["v"][0] if isinstance(node, dict) else node[0]


def test_readable_values_stay_readable() -> None:
    """Plain JSON is written as it is, so that people can read an index."""
    value = {"best": 0.5, "history": [1, 2], "name": "run", "done": False, "extra": {"x": None}}
    assert encode(value) == value


def test_a_dict_that_looks_like_a_tagged_node_is_kept_apart() -> None:
    """User keys that collide with the tag do not turn a dict into another type."""
    value = {"$": "tuple", "v": [1, 2]}
    assert through_json(value) == value


def test_leaves_are_handed_over_with_their_path() -> None:
    """Objects the tree does not know go through the caller's leaf, by path, and back."""
    seen: list[tuple[object, ...]] = []

    def leaf(value: object, path: tuple[object, ...]) -> tuple[str, object] | None:
        seen.append(path)
        return encode_leaf(value, path)

    tree = encode_tree({"a": [0, Leaf((1, 2))]}, path=("opt",), leaf=leaf)
    assert seen == [("opt", "a", 1)]
    assert tree == {"a": [0, {"$": "leaf", "v": {"$": "tuple", "v": [1, 2]}}]}
    assert decode(tree)["a"][1].value == (1, 2)


def test_parts_of_a_leaf_keep_the_path_of_the_leaf() -> None:
    """A leaf that is saved in parts adds no component of its own to the paths below it."""
    seen: list[tuple[object, ...]] = []

    def leaf(value: object, path: tuple[object, ...]) -> tuple[str, object] | None:
        seen.append(path)
        if isinstance(value, Leaf):
            return "leaf", value.value
        return "parts", SamePath(({"x": Leaf(1)}, 2))

    tree = encode_tree([object()], path=("opt",), leaf=leaf)
    assert seen == [("opt", 0), ("opt", 0, "x")]
    assert tree == [{"$": "parts", "v": [{"x": {"$": "leaf", "v": 1}}, 2]}]


class Color(enum.IntEnum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [Color.RED, Point(1, 2), Text("x"), defaultdict(int), lambda: 0, object(), math, iter([])],
    ids=lambda value: type(value).__name__,
)
def test_unknown_types_are_refused_by_path_and_type(value: Any) -> None:
    """What would need pickle raises StateError that names the key path, the type, and a way out."""
    with pytest.raises(StateError) as caught:
        encode({"a": [value]})
    message = str(caught.value)
    assert "item['a'][0]" in message
    assert type(value).__qualname__ in message
    assert "state_dict()" in message


def test_cycles_are_refused() -> None:
    """A container inside itself raises StateError that names where."""
    value: dict[str, Any] = {"a": []}
    value["a"].append(value)
    with pytest.raises(StateError, match=r"item\['a'\]\[0\] contains itself"):
        encode(value)


def test_the_same_container_twice_is_no_cycle() -> None:
    """A list that occurs twice side by side is saved twice."""
    shared = [1]
    assert encode({"a": shared, "b": shared}) == {"a": [1], "b": [1]}


def test_depth_is_bounded_and_the_bound_round_trips() -> None:
    """The deepest value that can be saved can be restored; one deeper is refused."""

    def nested(levels: int) -> Any:
        value: Any = 0
        for _ in range(levels):
            value = OrderedDict([(1, value)])
        return value

    assert through_json(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    with pytest.raises(StateError, match="levels deep"):
        encode(nested(MAX_DEPTH + 1))


def test_a_nearly_full_stack_gives_the_clear_error_too() -> None:
    """Encoding from deep inside user code ends in StateError, not RecursionError."""
    value: Any = 0
    for _ in range(MAX_DEPTH):
        value = [value]

    def dive(levels: int) -> None:
        if levels:
            dive(levels - 1)
        else:
            encode(value)

    depth = len(list(_frames()))
    with pytest.raises(StateError, match="nested too deeply"):
        dive(sys.getrecursionlimit() - depth - 40)


def _frames() -> Any:
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
