"""Servers of the demo: none of their processes outlives them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launches import wait_until

from ckpt_tasks.demo import processes
from ckpt_tasks.demo.processes import Server, end_servers, undisturbed
from ckpt_tasks.demo.watcher import Watcher
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.fencing.process import process_is_alive, this_process
from ckpt_tasks.format.records import Process

# A server that ignores SIGTERM, as does its child in a session of its own.
SCRIPT = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
pathlib.Path(str(os.getpid())).touch()
time.sleep(300)
"""


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    with Watcher() as watcher:
        yield watcher


@pytest.fixture
def server(tmp_path: Path, watcher: Watcher) -> Server:
    (tmp_path / "stubborn.py").write_text(SCRIPT, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    log = tmp_path / "server.log"
    return Server("stubborn", environment=environment, log=log, watcher=watcher)


def _family(folder: Path) -> list[Process]:
    def names() -> list[str]:
        return [path.name for path in folder.iterdir() if path.name.isdigit()]

    wait_until(lambda: len(names()) == 2, "both processes")
    return [this_process(int(name)) for name in names()]


def test_end_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    """Neither processes that ignore SIGTERM nor those in other sessions survive."""
    family = _family(tmp_path)
    end_servers(server, grace=0.3)
    assert not server.running
    assert [process_is_alive(process) for process in family] == [False, False]


def test_server_that_ends_is_told_with_its_log(tmp_path: Path, watcher: Watcher) -> None:
    """What waits for it does not wait on, and names the log to look into."""
    log = tmp_path / "server.log"
    server = Server("no_such_module", environment=dict(os.environ), log=log, watcher=watcher)
    with pytest.raises(
        CkptTasksError, match=r"up: 'no_such_module' ended with 1; see .*server.log"
    ):
        processes.wait_until(lambda: False, [server], within=60, what="up")
    assert "No module named no_such_module" in server.log.read_text("utf-8")


def test_interrupt_waits_until_servers_have_ended(request: pytest.FixtureRequest) -> None:
    """A second Ctrl-C comes after the block that ends servers, not within it."""
    # Tests that run in the background of a shell have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    ended = []

    def end() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            ended.append("all")

    with pytest.raises(KeyboardInterrupt):
        end()
    assert ended == ["all"]
