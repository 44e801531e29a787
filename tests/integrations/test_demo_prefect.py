"""``ckpt-tasks demo --look``: the pages of the last demo, as long as somebody looks."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import requests
from support.launches import commanded, family, is_alive, wait_until


def test_prefects_pages_are_shown_until_the_demo_is_ended(tmp_path: Path) -> None:
    """The server is up; a signal is answered with what is done, and ends it."""
    folder, log = tmp_path / "demo", tmp_path / "log"
    (folder / "prefect").mkdir(parents=True)
    (folder / ".ckpt-tasks-demo").touch()
    with commanded("demo", "--look", "--folder", str(folder), log=log) as process:
        wait_until(lambda: "Ctrl-C ends it" in log.read_text(), "the server")
        url = re.findall(r"is up: (http://127.0.0.1:\d+);", log.read_text())[0]
        assert requests.get(f"{url}/api/health", timeout=30).ok
        members = family(psutil.Process(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert "interrupted: ending all" in log.read_text()
    assert not [member for member in members if is_alive(member)]
