"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["readable_size"]

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def readable_size(size: int) -> str:
    """``3.41 MB``: three digits, decimal units, as object stores count."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"
