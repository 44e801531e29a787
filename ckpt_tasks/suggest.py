"""The nearest valid name, for messages about wrong ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]

_LISTED = 12


def did_you_mean(name: str, valid: Iterable[str], *, what: str = "valid names") -> str:
    """A clause for the end of a message: the nearest of `valid`, or all of them if few.

    Parameters
    ----------
    name
        What was asked for.
    valid
        What there is.
    what
        Plural noun for `valid`.
    """
    names = sorted(set(valid))
    if not names:
        return f"there are no {what}"
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {shown}{more}"
