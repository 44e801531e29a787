"""Summary and parameter descriptions of a docstring: numpydoc, Google style or Sphinx fields."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

__all__ = ["describe_parameters", "summary_of"]

_NUMPY_SECTION = re.compile(r"^(?:Other )?Parameters[ \t]*\n-{3,}[ \t]*\n", re.MULTILINE)
_NUMPY_NEXT_SECTION = re.compile(r"^\S.*\n-{3,}[ \t]*$", re.MULTILINE)
_GOOGLE_SECTION = re.compile(
    r"^(?:Args|Arguments|Parameters|Keyword Args):[ \t]*\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)",
    re.MULTILINE,
)
_GOOGLE_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_SPHINX_FIELD = re.compile(
    r"^:param\s+(?:[^:\n]*\s)?\*{0,2}(\w+):[ \t]*(.*(?:\n[ \t]+\S.*)*)", re.M
)


def summary_of(docstring: str) -> str:
    """The first paragraph, on one line."""
    return _one_line(docstring.strip().split("\n\n", 1)[0])


def describe_parameters(docstring: str) -> dict[str, str]:
    """The description of each parameter that the docstring has one for.

    Parameters
    ----------
    docstring
        Without indentation, as ``inspect.cleandoc`` leaves it.
    """
    found: dict[str, str] = {}
    for entries in (_sphinx_entries, _google_entries, _numpy_entries):
        found.update(entries(docstring))
    return found


def _numpy_entries(docstring: str) -> Iterator[tuple[str, str]]:
    for section in _NUMPY_SECTION.finditer(docstring):
        rest = docstring[section.end() :]
        end = _NUMPY_NEXT_SECTION.search(rest)
        for header, body in _blocks(rest[: end.start()] if end else rest):
            for name in header.split(":", 1)[0].split(","):
                yield name.strip().lstrip("*"), body


def _google_entries(docstring: str) -> Iterator[tuple[str, str]]:
    for section in _GOOGLE_SECTION.finditer(docstring + "\n"):
        for header, body in _blocks(textwrap.dedent(section[1])):
            entry = _GOOGLE_ENTRY.match(header)
            if entry:
                yield entry[1], _one_line(f"{entry[2]} {body}")


def _sphinx_entries(docstring: str) -> Iterator[tuple[str, str]]:
    for field in _SPHINX_FIELD.finditer(docstring):
        yield field[1], _one_line(field[2])


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each line at the margin with the indented lines that follow it, those on one line."""
    header, body = "", list[str]()
    for line in text.splitlines():
        if line.strip() and not line[0].isspace():
            if header:
                yield header, _one_line(" ".join(body))
            header, body = line, []
        else:
            body.append(line)
    if header:
        yield header, _one_line(" ".join(body))


def _one_line(text: str) -> str:
    return " ".join(text.split())
