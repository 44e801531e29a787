"""Faults strike stores, registries and file systems alike, at the operation that they name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tasks.errors import RegistryError, StoreError
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing import (
    FakeClock,
    Fault,
    FaultInjector,
    FaultyRegistry,
    FaultyStore,
    FileRegistry,
    MemoryRegistry,
    RegistryMemory,
    faulty_files,
)
from ckpt_tasks.testing.registry import example_description
from ckpt_tasks.testing.registry_wrappers import REGISTRY_CHANGES, REGISTRY_OPERATIONS
from ckpt_tasks.testing.wrappers import CHANGES


def test_one_numbering_of_store_and_registry(tmp_path: Path) -> None:
    """An injector that both have counts the operations of both, and strikes either."""
    injector = FaultInjector([Fault(at=2), Fault(at=3)], counted=CHANGES | REGISTRY_CHANGES)
    store = FaultyStore(LocalStore(str(tmp_path)), injector)
    registry = FaultyRegistry(MemoryRegistry(RegistryMemory()), injector)
    store.create("run/a", b"1")
    with pytest.raises(RegistryError, match=r"before create_run of digits .*operation 2"):
        registry.create_run(example_description(run="digits"))
    with pytest.raises(StoreError, match=r"before create of run/b .*operation 3"):
        store.create("run/b", b"1")
    assert registry.find_run(example_description(run="digits")) is None
    assert injector.log == [("create", "run/a"), ("create_run", "digits"), ("create", "run/b")]


def test_a_time_out_takes_effect_or_not_and_takes_its_time(tmp_path: Path) -> None:
    """It raises what a real one raises, after as long as it is told, by the test's clock."""
    clock = FakeClock()
    injector = FaultInjector(
        [Fault(at=1, how="timeout", when="after", seconds=20.0), Fault(at=2, how="timeout")],
        sleep=clock.sleep,
    )
    store = FaultyStore(LocalStore(str(tmp_path)), injector)
    for path in ("run/a", "run/b"):
        with pytest.raises(StoreError, match="no answer within") as caught:
            store.create(path, b"1")
        assert isinstance(caught.value.__cause__, TimeoutError)
    assert clock.slept == [20.0, 30.0]
    assert (store.store.exists("run/a"), store.store.exists("run/b")) == (True, False)


@pytest.mark.parametrize(("when", "seen"), [("before", False), ("after", True)])
def test_a_stall_changes_nothing_but_the_time(tmp_path: Path, when: str, seen: bool) -> None:
    """It waits before the operation, or before its answer, and then all goes on."""
    inner = LocalStore(str(tmp_path))
    found = []
    injector = FaultInjector(
        [Fault(at=1, how="stall", when=when)],  # type: ignore[arg-type]
        sleep=lambda seconds: found.append((seconds, inner.exists("run/a"))),
    )
    FaultyStore(inner, injector).create("run/a", b"1")
    assert found == [(30.0, seen)]
    assert inner.read("run/a") == b"1"


def test_a_stalled_process_has_no_half_and_no_later() -> None:
    """Such a fault is a mistake in the test."""
    with pytest.raises(ValueError, match="before or after"):
        Fault(at=1, when="late", how="stall")


def test_every_operation_of_a_registry_can_fail() -> None:
    """None passes an injector by, but for `links`, which asks nobody."""
    assert REGISTRY_OPERATIONS >= REGISTRY_CHANGES
    abstract = MemoryRegistry.__mro__[1].__abstractmethods__
    assert abstract - REGISTRY_OPERATIONS == {"links"}


def test_calls_of_a_file_system(tmp_path: Path) -> None:
    """Each of a store's system calls has a number; others' calls have none."""
    store = LocalStore(str(tmp_path / "store"))
    with faulty_files(store.root) as injector:
        store.create("run/a", b"1")
        (tmp_path / "elsewhere").mkdir()
        store.delete("run/a")
    names = [operation.removeprefix("file.") for operation, _ in injector.log]
    assert [n for n in names if n in ("link", "writev", "rmdir")] == ["writev", "link", "rmdir"]
    assert names.count("unlink") == 2
    assert ("file.link", "run/a") in injector.log
    assert all(".." not in subject for _, subject in injector.log)
    with (
        faulty_files(store.root, FaultInjector([Fault(at=1)], counted={"file.link"})),
        pytest.raises(StoreError, match=r"injected fault before file\.link") as caught,
    ):
        store.create("run/a", b"1")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


KILLED = """
import sys
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing import Fault, faulty_files
store = LocalStore(sys.argv[1])
store.create("run/1", b"1234")
with faulty_files(sys.argv[1]) as injector:
    store.put("run/1", b"1234")
number = [operation for operation, _ in injector.log].index("file.writev") + 1
with faulty_files(sys.argv[1], [Fault(at=number, when="during", how="kill")]):
    store.put("run/1", b"5678")
"""


def test_a_kill_in_a_write_of_a_file(tmp_path: Path) -> None:
    """Half of it is there, under its hidden name, and is removed when it is old enough."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    store = LocalStore(str(tmp_path))
    hidden = [path for path in tmp_path.rglob(".tmp-*") if path.is_file()]
    assert [path.read_bytes() for path in hidden] == [b"56"]
    assert store.abort_uploads("", older_than=3600.0) == []
    assert [upload.path for upload in store.abort_uploads("run/", older_than=0.0)] == [
        os.path.relpath(hidden[0], tmp_path)
    ]
    assert store.abort_uploads("", older_than=0.0) == []
    assert [info.path for info in store.list_objects("")] == ["run/1"]
    assert not hidden[0].exists()


def test_a_registry_in_a_file_outlives_its_process(tmp_path: Path) -> None:
    """What one has been told, another one knows, its own numbers going on."""
    path = tmp_path / "registry"
    description = example_description()
    ids = FileRegistry(path).create_run(description)
    other = FileRegistry(path)
    assert other.find_run(description) == ids
    assert other.create_run(example_description(uid="another")).run_id != ids.run_id
