"""The real command line, called as users call it, and what must hold of its errors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).parent / "ckpt-tasks")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The only line that says why it failed; there is no traceback beside it."""
        assert "Traceback" not in self.out + self.err, self
        (line,) = self._last_words()
        return line

    def _last_words(self) -> list[str]:
        lines = self.err.splitlines()
        said = [line for line in lines if line.startswith(("error: ", "failed: "))]
        assert said == lines[-1:], self
        return said

    @property
    def said(self) -> list[str]:
        """What it said on standard error, but for the line of `train` that names the store."""
        return [line for line in self.err.splitlines() if not line.startswith("run 'toy' in the ")]

    @property
    def error_after_traceback(self) -> str:
        """The last line of a failure of the user's code, whose traceback was shown once."""
        assert (self.out + self.err).count("Traceback (most recent call last)") == 1, self
        (line,) = self._last_words()
        return line

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("WARNING: ")]


def ckpt_tasks(*arguments: str, folder: Path, environment: dict[str, str] | None = None) -> Answer:
    """Run ``ckpt-tasks ARGUMENTS...`` in `folder`, with no configuration or credentials but
    those in `environment`.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CKPT_TASKS_", "AWS_", "MLFLOW_"))
    }
    settings = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(folder),
        "PYTHONPATH": str(TESTS),
        **(environment or {}),
    }
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        env={**inherited, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
