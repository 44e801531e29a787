"""Commands that a person can type as they are printed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command_line", "short_path"]


def command_line(program: str, *arguments: str) -> str:
    """A call of a program of this environment, which need not be on the PATH.

    Parameters
    ----------
    program
        Name of an executable that lies beside the interpreter.
    """
    beside = Path(sys.executable).with_name(program)
    typed = program if shutil.which(program) == str(beside) else short_path(beside)
    return shlex.join([typed, *arguments])


def short_path(path: Path) -> str:
    """A path as seen from the working directory, where that is shorter."""
    relative = os.path.relpath(path)
    if os.sep not in relative:
        relative = os.path.join(os.curdir, relative)  # a bare name would be looked for on the PATH
    return min(str(path), relative, key=len)
