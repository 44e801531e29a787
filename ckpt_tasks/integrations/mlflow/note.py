"""The run's description (`mlflow.note.content`): our part of it, between markers.

What people write around the markers stays theirs.
"""

from __future__ import annotations

import itertools
import re

__all__ = ["NOTE_TAG", "merged_note"]

NOTE_TAG = "mlflow.note.content"

_BEGIN = "<!-- ckpt-tasks: begin -->"
_END = "<!-- ckpt-tasks: end -->"
_OURS = re.compile(
    rf"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL
)
_LIMIT = 8000  # characters of a run's tag
_CUT = "\n\n*(shortened: the description has no more room)*"


def merged_note(existing: str, ours: str) -> str:
    """The note with our part replaced, or appended where there is none.

    Parameters
    ----------
    existing
        The whole note as it is.
    ours
        Our new part, in Markdown; its end is cut where the note would grow too long. People's
        text is never cut: where it leaves no room, the note stays as it is.
    """
    ours = ours.replace(_BEGIN, "").replace(_END, "").strip()
    found = list(_OURS.finditer(existing))
    if found:
        before, after = existing[: found[0].start()], existing[found[-1].end() :]
        between = "".join(
            existing[left.end() : right.start()] for left, right in itertools.pairwise(found)
        )
        after = between + after
    else:
        before, after = (f"{existing.rstrip()}\n\n" if existing.strip() else ""), ""
    room = _LIMIT - len(before) - len(after) - len(_BEGIN) - len(_END) - 4
    if room < len(_CUT):
        return existing
    if len(ours) > room:
        ours = ours[: room - len(_CUT)].rpartition("\n")[0] + _CUT
    return f"{before}{_BEGIN}\n\n{ours}\n\n{_END}{after}"
