"""Text of others, made harmless for where it is shown.

Names, reasons and messages that a store holds may have been written by anybody: on a terminal
they could move the cursor and set its title, in Markdown they could be links and HTML.
"""

from __future__ import annotations

import re

__all__ = ["markdown_code", "markdown_text", "printable", "printable_json"]

# C0 and C1 controls, separators of lines, and what turns the direction of text: all that a
# terminal or a reader of logs takes for more than a letter. Of surrogates, none can be written.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_UNWRITABLE = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")
_MARKUP = re.compile(r"[\\`\[\]<>|]")


def printable(text: str) -> str:
    """Text as a terminal or a log shows it: on one line, with control characters spelled out."""
    return _spelled(_BREAKS.sub(" ", text))


def printable_json(text: str) -> str:
    """JSON in several lines that a terminal shows as it is, and that says the same."""
    return "\n".join(_CONTROL.sub(_json_escape, line) for line in text.split("\n"))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as such, also in a table's cell: no link, no HTML, no code."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))


def markdown_code(text: str) -> str:
    """A span of code, also in a table's cell; backticks, which would end it, are left out."""
    return f"`{printable(text).replace('`', '').replace('|', '/')}`"


def _spelled(text: str) -> str:
    return _UNWRITABLE.sub(_escape, _CONTROL.sub(_escape, text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
