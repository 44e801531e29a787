"""A few thousand hostile records in each run of the suite; ``make fuzz`` tries them for minutes."""

from __future__ import annotations

import re
import subprocess
import sys

from support import fuzz_readers

EXECUTIONS = 2500


def test_readers_refuse_or_read() -> None:
    """No reader raises what it does not announce, takes seconds, or more memory than allowed."""
    done = subprocess.run(
        [sys.executable, fuzz_readers.__file__, "--executions", str(EXECUTIONS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"fuzz: (\d+) executions .* (\d+) refused, 0 crashes", done.stdout)
    assert told is not None, done.stdout
    executions, refused = map(int, told.groups())
    assert executions == EXECUTIONS
    assert 0.5 < refused / executions < 0.95, "some are refused, and some are just values"
