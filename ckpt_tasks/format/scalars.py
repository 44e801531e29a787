"""Scalars of the typed JSON tree: how each is spelled, and how it is read back.

Reading trusts nothing: what is no such scalar raises ``ValueError``.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from typing import Any

__all__ = [
    "DECODERS",
    "ENCODERS",
    "TAG",
    "TAGGED",
    "VALUE",
    "is_unicode",
    "parts_of",
    "tagged",
    "text_of",
]

TAG = "$"
"""Member of a tagged node that names its type. User dicts that have it are tagged themselves."""
VALUE = "v"
TAGGED = frozenset((TAG, VALUE))
_CANONICAL_NAN = struct.pack(">d", math.nan)
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def tagged(tag: str, value: object) -> dict[str, object]:
    return {TAG: tag, VALUE: value}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _encode_str(value: str) -> Any:
    if is_unicode(value):
        return value
    return tagged("text", _base64(value.encode("utf-8", "surrogatepass")))


def _encode_int(value: int) -> Any:
    return value if _INT_MIN <= value <= _INT_MAX else tagged("int", f"{value:x}")


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return tagged("float", "inf" if value > 0 else "-inf")
    raw = struct.pack(">d", value)
    return tagged("float", "nan" if raw == _CANONICAL_NAN else raw.hex())


def _encode_complex(value: complex) -> Any:
    return tagged("complex", [_encode_float(value.real), _encode_float(value.imag)])


def _encode_range(value: range) -> Any:
    return tagged("range", [_encode_int(part) for part in (value.start, value.stop, value.step)])


ENCODERS: dict[type, Callable[[Any], Any]] = {
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    bytes: lambda value: tagged("bytes", _base64(value)),
    bytearray: lambda value: tagged("bytearray", _base64(value)),
    range: _encode_range,
}


def text_of(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"text was expected, not a {type(value).__name__}")
    return value


def parts_of(node: object, count: int) -> list[Any]:
    if type(node) is not list or len(node) != count:
        raise ValueError(f"a list of {count} was expected")
    return node


def _decode_bytes(node: object) -> bytes:
    return base64.b64decode(text_of(node), validate=True)


def _decode_str(node: object) -> str:
    return _decode_bytes(node).decode("utf-8", "surrogatepass")


def _decode_int(node: object) -> int:
    return int(text_of(node), 16)


def _decode_range_part(node: object) -> int:
    if type(node) is dict and node.keys() == TAGGED and node[TAG] == "int":
        return _decode_int(node[VALUE])
    if type(node) is not int:
        raise ValueError(f"an integer was expected, not a {type(node).__name__}")
    return node


def _decode_float(node: object) -> float:
    text = text_of(node)
    if text in ("nan", "inf", "-inf"):
        return float(text)
    raw = bytes.fromhex(text)
    value: float = struct.unpack(">d", raw)[0] if len(raw) == 8 else 0.0
    if not math.isnan(value):
        raise ValueError("a tagged float is no NaN")
    return value


def _decode_complex_part(node: object) -> float:
    if type(node) is float:
        return node
    if type(node) is dict and node.keys() == TAGGED and node[TAG] == "float":
        return _decode_float(node[VALUE])
    raise ValueError("a complex number's part is no float")


DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": _decode_int,
    "float": _decode_float,
    "complex": lambda node: complex(*map(_decode_complex_part, parts_of(node, 2))),
    "bytes": _decode_bytes,
    "bytearray": lambda node: bytearray(_decode_bytes(node)),
    "text": _decode_str,
    "range": lambda node: range(*map(_decode_range_part, parts_of(node, 3))),
}
