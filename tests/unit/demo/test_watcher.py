"""The watcher of the demo: servers do not outlive a demo that could not end them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
from support.launches import family, is_alive, wait_gone, wait_until

from ckpt_tasks.demo.families import end_families
from ckpt_tasks.demo.processes import Server
from ckpt_tasks.demo.watcher import Watcher
from ckpt_tasks.fencing.process import this_process

# A server with a child in a session of its own, which ignores SIGTERM.
SERVER = """
import os, pathlib, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    pathlib.Path("is-up").touch()
time.sleep(300)
"""
DEMO = """
import os, pathlib, time
from ckpt_tasks.demo.processes import Server
from ckpt_tasks.demo.watcher import Watcher

log = pathlib.Path("log").absolute()
server = Server("served", environment=os.environ, log=log, watcher=Watcher())
time.sleep(300)
"""


def _environment(folder: Path) -> dict[str, str]:
    (folder / "served.py").write_text(SERVER, "utf-8")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_servers_end_after_a_demo_that_is_killed(tmp_path: Path) -> None:
    """Neither a server nor what it has started is left, the watcher itself included."""
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO],
        cwd=tmp_path,
        env=_environment(tmp_path),
        start_new_session=True,
    )
    wait_until((tmp_path / "is-up").exists, "the server")
    members = family(psutil.Process(demo.pid))
    demo.kill()
    demo.wait()
    assert len(members) == 4
    wait_gone(members)


def test_leaving_the_block_ends_what_was_left(tmp_path: Path) -> None:
    """An interrupt between the start of a server and its `try` leaves nothing behind."""
    with Watcher() as watcher:
        environment = _environment(tmp_path)
        server = Server("served", environment=environment, log=tmp_path / "log", watcher=watcher)
        wait_until((tmp_path / "is-up").exists, "the server")
        members = family(psutil.Process(server.process.pid))
    assert len(members) == 2
    assert not [member for member in members if is_alive(member)]


def test_another_process_that_got_the_pid_is_left_alone() -> None:
    """Pids are given again: only the very process that was started is ended."""
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        there = this_process(process.pid)
        end_families([msgspec.structs.replace(there, started=there.started - 1)], grace=0)
        alive = process.poll() is None
        end_families([there], grace=0)
    assert alive
