"""Started without standard streams, as cron and daemons do: the command works all the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support.toy_training
from support.shell import COMMAND, contents

TOY = f"{support.toy_training.__file__}:train"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_trains_with_closed_standard_streams(tmp_path: Path, closed: str) -> None:
    """Whichever of descriptors 0, 1 and 2 are closed, training ends well and is stored; what can
    be said is said on those that are open.
    """
    said = "" if "2>&-" in closed else "2>said"
    command = [COMMAND, "train", TOY, "--run", "toy", "--store", "store", "-p", "epochs=1"]
    done = subprocess.run(
        ["bash", "-c", f'"$0" "$@" {closed} {said}', *command],
        cwd=tmp_path,
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    text = (tmp_path / "said").read_text() if said else ""
    assert done.returncode == 0, text
    assert "toy/marks/completed.json" in contents(tmp_path / "store")
    assert ("trained to its end" in text) == bool(said)
    assert not any(word in text for word in ("Traceback", "AttributeError", "error:"))


def test_closed_output_is_no_error_for_a_listing(tmp_path: Path) -> None:
    """A command that only prints ends as it does with an output."""
    (tmp_path / "store").mkdir()
    command = [COMMAND, "runs", "--store", "store"]
    shell = ["bash", "-c", '"$0" "$@" <&- >&- 2>said', *command]
    assert subprocess.run(shell, cwd=tmp_path, timeout=60, check=False).returncode == 0
    assert (tmp_path / "said").read_text() == ""
