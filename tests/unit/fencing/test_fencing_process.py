"""Which process is which, and whether it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its end."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    yield process
    process.kill()
    process.communicate()


def test_alive(child: subprocess.Popen[bytes]) -> None:
    """A process and its living child are alive, and are not each other."""
    assert process_is_alive(this_process()) is True
    assert process_is_alive(this_process(child.pid)) is True
    assert this_process() != this_process(child.pid)


def test_dead(child: subprocess.Popen[bytes]) -> None:
    """A process that has ended and was waited for is dead."""
    identity = this_process(child.pid)
    child.kill()
    child.wait()
    assert process_is_alive(identity) is False


def test_zombie_process(child: subprocess.Popen[bytes]) -> None:
    """One that has ended and was not waited for is dead too, though its pid still stands."""
    identity = this_process(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    os.kill(child.pid, 0)
    assert process_is_alive(identity) is False


def test_reused_pid(child: subprocess.Popen[bytes]) -> None:
    """Another process under the same pid is told apart by its start, and is left alone."""
    identity = this_process(child.pid)
    earlier = msgspec.structs.replace(identity, started=identity.started - 1)
    assert process_is_alive(earlier) is False
    assert end_process(earlier) is True
    assert child.poll() is None


@pytest.mark.parametrize("field", ["host", "boot_id"])
def test_process_of_another_machine(child: subprocess.Popen[bytes], field: str) -> None:
    """Nothing can be known of it, and nothing is done to the local process of that pid."""
    foreign = msgspec.structs.replace(this_process(child.pid), **{field: "elsewhere"})
    assert process_is_alive(foreign) is None
    assert end_process(foreign) is False
    assert child.poll() is None


def test_end_process(child: subprocess.Popen[bytes]) -> None:
    """The very process is killed, and is gone when the call returns."""
    assert end_process(this_process(child.pid)) is True
    assert child.wait() == -9


def test_end_of_a_process_that_has_ended(child: subprocess.Popen[bytes]) -> None:
    """There is nothing to do, and it is known to be gone."""
    identity = this_process(child.pid)
    child.kill()
    child.wait()
    assert end_process(identity) is True
