"""The demo runs from the wheel: killed twice, resumed, and proved equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

command = [str(Path(sys.executable).with_name("ckpt-tasks")), "demo", "--folder", "demo"]
answer = subprocess.run(command, capture_output=True, text=True)
assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
