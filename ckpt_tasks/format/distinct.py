"""JSON in which no object has a name twice: two readers could take two things from it."""

from __future__ import annotations

import itertools
import json
from typing import Any

__all__ = ["check_distinct"]


def check_distinct(text: bytes, written: bytes) -> None:
    """Refuse JSON with a name twice; msgspec takes the last one, and does not say so.

    Parameters
    ----------
    text
        As it was found, decoded without an error.
    written
        As this version writes what it has been decoded to. Where it is the same, which is as good
        as always, there is no name twice, and nothing is decoded again by what takes longer.

    Raises ``ValueError``.
    """
    if text != written:
        json.loads(text, object_pairs_hook=_distinct)


def _distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        names = sorted(name for name, _ in members)
        twice = next(one for one, other in itertools.pairwise(names) if one == other)
        raise ValueError(f"an object has the name {twice[:99]!r} twice")
    return found
