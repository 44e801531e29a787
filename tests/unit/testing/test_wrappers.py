"""The faulty and the slow store do exactly what they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing import FakeClock, Fault, FaultyStore, LatencyStore


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(f"wrappers-{os.urandom(8).hex()}")


def test_counts_changes_only(memory: MemoryStore) -> None:
    """Operations that change the store are counted and logged in order; others pass unseen."""
    store = FaultyStore(memory)
    store.create("run/a", b"1")
    store.read("run/a")
    store.write("run/b", [b"1"], 1)
    store.list_objects("")
    store.delete("run/a")
    assert store.log == [("create", "run/a"), ("write", "run/b"), ("delete", "run/a")]
    assert store.count == 3


def test_counts_what_it_is_told(memory: MemoryStore) -> None:
    """Reads can be counted, and fail, too."""
    memory.put("run/a", b"1")
    store = FaultyStore(memory, [Fault(at=2)], counted={"read", "exists"})
    assert store.read("run/a") == b"1"
    with pytest.raises(StoreError, match=r"before exists of run/a \(operation 2\)"):
        store.exists("run/a")
    assert store.exists("run/a")


@pytest.mark.parametrize("operation", ["create", "put", "write"])
@pytest.mark.parametrize(
    ("when", "lands"), [("before", False), ("after", True), ("during", False), ("late", False)]
)
def test_moment_of_a_fault(memory: MemoryStore, operation: str, when: str, lands: bool) -> None:
    """`before` and `during` leave no object, `after` leaves it though it raises."""
    store = FaultyStore(memory, [Fault(at=1, when=when)])
    act = getattr(store, operation)
    arguments = (iter([b"12", b"34"]), 4) if operation == "write" else (b"1234",)
    with pytest.raises(StoreError, match="injected"):
        act("run/x", *arguments)
    assert memory.exists("run/x") is lands
    store.land()
    assert memory.exists("run/x") is (lands or when == "late")
    assert when != "late" or memory.read("run/x") == b"1234"


def test_late_lands_after_its_delay(memory: MemoryStore) -> None:
    """A late create lands after so many further operations, and loses against what stands."""
    store = FaultyStore(memory, [Fault(at=1, when="late", delay=2, times=2)])
    for path in ("run/x", "run/y"):
        with pytest.raises(StoreError):
            store.create(path, b"late")
    memory.create("run/y", b"first")
    store.put("run/3", b"")
    assert memory.read("run/x") == b"late"
    store.put("run/4", b"")
    assert memory.read("run/y") == b"first"


def test_faults_last_as_told(memory: MemoryStore) -> None:
    """A fault meets `times` operations, and no others."""
    store = FaultyStore(memory, [Fault(at=2, times=2)])
    outcomes = []
    for number in range(5):
        try:
            store.put(f"run/{number}", b"")
            outcomes.append(True)
        except StoreError:
            outcomes.append(False)
    assert outcomes == [True, False, False, True, True]


KILLED = """
import sys
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing import Fault, FaultyStore
store = FaultyStore(LocalStore(sys.argv[1]), [Fault(at=2, when=sys.argv[2], how="kill")])
store.create("run/1", b"1")
store.write("run/2", [bytes(8 << 20)] * 4, 32 << 20)
"""


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_kills_the_process(tmp_path: Path, when: str) -> None:
    """`kill` ends the process by SIGKILL, with nothing, half, or all of it written."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], check=False)
    assert done.returncode == -signal.SIGKILL
    store = LocalStore(str(tmp_path))
    assert store.read("run/1") == b"1"
    assert store.exists("run/2") is (when != "before")
    if when != "before":
        assert store.size("run/2") == {"during": 16 << 20, "after": 32 << 20}[when]


def test_dead_process_has_no_later() -> None:
    """A killed process cannot let a put land late: such a fault is a mistake in the test."""
    with pytest.raises(ValueError, match="killed"):
        Fault(at=1, when="late", how="kill")


def test_latency_is_added(memory: MemoryStore) -> None:
    """Chosen operations wait; a write also takes its size at the given speed."""
    clock = FakeClock()
    store = LatencyStore(
        memory,
        seconds=2.0,
        bytes_per_second=100.0,
        operations={"create", "write"},
        sleep=clock.sleep,
    )
    store.create("run/a", b"1")
    assert clock.slept == [2.0]
    store.read("run/a")
    assert clock.slept == [2.0]
    store.write("run/b", [bytes(50)], 50)
    assert sum(clock.slept) == 2.0 + 2.0 + 0.5
    assert clock() == 4.5
    assert memory.size("run/b") == 50
