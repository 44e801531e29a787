"""Tables and ages for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from ckpt_tasks.escaping import printable

__all__ = ["age", "age_or_dash", "echo", "table"]

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line, in which control characters are spelled out: much of it comes from a store."""
    click.echo(printable(str(text)), err=err)


def age(seconds: float) -> str:
    """A duration in its two largest units: ``3d 4h``, ``12m 5s``, ``0s``."""
    rest = max(0, int(seconds))
    parts = []
    for length, unit in _UNITS:
        if rest >= length:
            parts.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(parts[:2]) or "0s"


def age_or_dash(timestamp: str | None, *, now: datetime | None = None) -> str:
    """How long ago a record's timestamp was; a dash where there is none, or none that reads."""
    if timestamp is None:
        return "-"
    try:
        then = datetime.fromisoformat(timestamp)
    except ValueError:
        return "-"
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return age(((now or datetime.now(UTC)) - then).total_seconds())


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: str | Sequence[str] = ""
) -> list[str]:
    """Lines of a table with aligned columns.

    Parameters
    ----------
    headers
        Names of the columns.
    rows
        Cells; each row as long as `headers`.
    right
        Names of right-aligned columns, also as one text, separated by spaces.
    """
    lines = [[header.upper() for header in headers], *([*map(printable, row)] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    named = right.split() if isinstance(right, str) else right
    to_right = [header in named for header in headers]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if to_right[column] else text.ljust(widths[column])

    return ["  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines]
