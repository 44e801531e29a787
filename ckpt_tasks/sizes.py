"""Sizes as people read them."""

from __future__ import annotations

import re

__all__ = ["parse_size", "readable_size"]

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.ASCII | re.IGNORECASE)


def readable_size(size: int) -> str:
    """``3.41 MB``: three digits, decimal units, as object stores count."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def parse_size(text: str) -> int:
    """Bytes of ``"500GB"``, ``"1.5 TiB"``, ``"20M"`` or plain ``"1000"``.

    Raises ``ValueError`` for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size; write '500GB', '1.5TiB' or bytes")
    unit: int = (1024 if match[3] else 1000) ** " kmgtp".index(match[2].lower() or " ")
    return round(float(match[1]) * unit)
