"""Records as an attacker would make them: what is right, with a few things changed.

Drawn from a `random.Random`, so that a seed says which one it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["Members", "dump", "hostile_name", "mutated_bytes", "mutated_json", "parse"]

_NESTED = (60, 130, 300, 450, 900, 3000)
"""Deeper than is decoded, than Python's stack, than either of several frames for each level."""

_REPEATED = 10_000
"""Characters of what is repeated: readers are looked at here, not what makes their input."""

RAW = [
    *("null", "true", "-1", "0", "1", "2", "0.5", "-0.0", "1e308", "1e999", "NaN", "Infinity"),
    *(str(2**power + plus) for power in (8, 31, 53, 62, 63, 64, 100) for plus in (-1, 0)),
    "9" * 200_000,
    "0." + "3" * 200_000,
    "1e" + "9" * 30,
    *('""', '".."', '"../../etc/passwd"', '"/etc/passwd"', '"file:///etc/passwd"', '"a//b"'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"\\u202e"', '"a\\\\..\\\\b"', '"a\\nb"', '"nan"'),
    '"' + "x" * 300_000 + '"',
    *("[]", "{}", "[[]]", "[0,0]", "[[],[],[]]", '{"$":"tensor","v":0}', '{"$":"tensor","v":9}'),
    *('{"$":"sparse","v":[]}', '{"$":"sharded","v":[{},null]}', '{"$":"dict","v":[[1,2],[1,2]]}'),
    *('{"$":"int","v":"' + "f" * 100_000 + '"}', '{"$":"float","v":"0000000000000000"}'),
    *('{"$":"bytes","v":"===="}', '{"$":"deque","v":[[1,2],1]}', '{"$":"range","v":[0,1,0]}'),
    *('{"$":"set","v":[[]]}', '{"$":"slice","v":[1,2]}', '{"$":1,"v":2}', '{"$":"tuple"}'),
    *("[" * depth + "]" * depth for depth in _NESTED),
    *('{"a":' * depth + "1" + "}" * depth for depth in _NESTED),
    *('{"$":"tuple","v":[' * depth + "]}" * depth for depth in _NESTED),
    *('{"$":"dict","v":[[0,' * depth + "0" + "]]}" * depth for depth in _NESTED),
    "[" + ",".join(["0"] * 20_000) + "]",
    *("[", "]", "{", "}", '"', ",", "\\", "\x00", "\ufeff"),
]
"""Tokens of JSON, and what is none."""

NAMES = [
    *("format", "$", "v", "dtype", "shape", "offset", "size", "rank", "index", "data_offsets"),
    *("__metadata__", "checksum", "required_features", "", "\x00", "__class__", "x" * 5000),
]


class Members(list[tuple[str, Any]]):
    """The members of an object, of which two may have one name."""


class _Raw(str):
    """Text that stands in the JSON as it is."""


def parse(data: bytes) -> Any:
    """JSON, with `Members` for objects."""
    return json.loads(data, object_pairs_hook=Members)


def dump(node: Any) -> str:
    """Inverse of `parse`."""
    if isinstance(node, tuple):  # a member alone
        node = Members([node])
    if isinstance(node, _Raw):
        return str(node)
    if isinstance(node, Members):
        inner = ",".join(f"{json.dumps(name)}:{dump(value)}" for name, value in node)
        return f"{{{inner}}}"
    if isinstance(node, list):
        return f"[{','.join(map(dump, node))}]"
    return json.dumps(node)


def _copied(node: Any) -> Any:
    if isinstance(node, tuple):  # a member, whose name is left behind
        return _copied(node[1])
    if isinstance(node, Members):
        return Members((name, _copied(value)) for name, value in node)
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _containers(node: Any) -> Iterator[list[Any]]:
    if isinstance(node, list):
        if node:
            yield node
        for value in node:
            yield from _containers(value[1] if isinstance(node, Members) else value)


def mutated_json(node: Any, draw: random.Random) -> Any:
    """A copy of a parsed JSON with one to four changes."""
    whole = _copied(node)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        containers = list(_containers(whole))
        if not containers:
            return _Raw(draw.choice(RAW))
        _change(draw.choice(containers), containers, draw)
    return whole


def _change(node: list[Any], others: list[list[Any]], draw: random.Random) -> None:
    place = draw.randrange(len(node))
    other = draw.choice(others)
    taken = _copied(draw.choice(other))  # a copy: nothing may come to contain itself
    change = draw.randrange(10)
    if change == 0:
        del node[place]
    elif change == 1:
        node.insert(draw.randrange(len(node) + 1), node[place])  # twice; of an object, its key
    elif change == 2 and len(dump([node[place]])) < _REPEATED:
        once = type(node)(node[place : place + 1])
        # Copies: else a later change of one were a change of all.
        node[:] = [_copied(once)[0] for _ in range(draw.choice((2, 30, 100)))]
    elif isinstance(node, Members):
        name, value = node[place]
        if change == 3:
            node[place] = (draw.choice(NAMES), value)
        elif change == 4:
            node[place] = (name, taken)
        else:
            node[place] = (name, _value(value, draw))
    elif change == 4:
        node[place] = taken
    else:
        node[place] = _value(node[place], draw)


def _value(value: Any, draw: random.Random) -> Any:
    if type(value) is int and draw.randrange(2):
        return value + draw.choice((-1, 1, 2**32, -(2**32), 2**62, value, -2 * value))
    if type(value) is str and draw.randrange(2):
        cut = draw.randrange(len(value) + 1)
        return value[:cut] + draw.choice(("", "/../", "\x00", "é", "\x1b[31m", "9")) + value[cut:]
    return _Raw(draw.choice(RAW))


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A copy of some bytes with one to eight changes."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place = draw.randrange(len(content) + 1)
        length = draw.choice((1, 1, 2, 8, 64, 4096))
        change = draw.randrange(6)
        if change == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif change == 1:
            del content[place : place + length]
        elif change == 2:
            content[place:place] = draw.randbytes(length)
        elif change == 3:
            content[place:place] = content[place : place + length]
        elif change == 4:
            del content[place:]
        else:
            content[place : place + 1] = draw.choice(RAW)[:5000].encode()
    return bytes(content)


def hostile_name(draw: random.Random) -> str:
    """A name as it may stand in a listing."""
    plain = draw.choice(
        ("step-00000010-a1-s1", "0001.json", "0002.resumed.json", "run.json", "a%20b")
    )
    if draw.randrange(3) == 0:
        return plain
    wild = mutated_bytes(plain.encode(), draw)[:300]
    return wild.decode("utf-8", draw.choice(("replace", "surrogateescape")))
