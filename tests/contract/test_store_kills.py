"""A process killed at any system call of a store leaves nothing that looks whole and is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import store_child
from support.store_child import DATA, OLD

from ckpt_tasks.store.local import LocalStore


def killed_stores(root: Path, operation: str) -> list[LocalStore]:
    """Stores, each left by a process killed one system call later; the last was not killed."""
    done = subprocess.run(
        [sys.executable, store_child.__file__, "kill", str(root), operation],
        check=True,
        capture_output=True,
        text=True,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["killed"] for report in reports] == [True] * (len(reports) - 1) + [False]
    assert reports[-1]["status"] == 0
    assert len(reports) > 5
    return [LocalStore(report["folder"]) for report in reports]


def content(store: LocalStore) -> bytes | None:
    return store.read("run/it") if store.exists("run/it") else None


def test_create_is_all_or_nothing(tmp_path: Path) -> None:
    """After a kill anywhere in `create`, the object is absent or whole, and can be created."""
    found = []
    for store in killed_stores(tmp_path, "create"):
        found.append(content(store))
        assert [info.path for info in store.list_objects("")] == ["run/it"] * (
            found[-1] is not None
        )
        if found[-1] is None:
            store.create("run/it", b"next")
            assert store.read("run/it") == b"next"
    assert set(found) == {None, DATA}
    assert found == sorted(found, key=lambda data: data is not None)


def test_put_is_old_or_new(tmp_path: Path) -> None:
    """After a kill anywhere in `put`, the object is the old one or the new one."""
    found = []
    for store in killed_stores(tmp_path, "put"):
        found.append(content(store))
        assert [info.path for info in store.list_objects("")] == ["run/it"]
    assert set(found) == {OLD, DATA}


def test_killed_write_is_found_by_its_name(tmp_path: Path) -> None:
    """After a kill in `write`, what is left is a prefix under its own name: it can be collected."""
    found = []
    for store in killed_stores(tmp_path, "write"):
        found.append(content(store) or b"")
        assert DATA.startswith(found[-1])
        names = [name for _, _, files in os.walk(store.root) for name in files]
        assert names in ([], ["it"])
    assert found[-1] == DATA
    assert any(0 < len(data) < len(DATA) for data in found)


@pytest.mark.parametrize("operation", ["create", "put"])
def test_leftovers_are_harmless(tmp_path: Path, operation: str) -> None:
    """Temporary files of killed writers are never listed, stop nobody, and can be removed."""
    leftovers = []
    for store in killed_stores(tmp_path, operation):
        if os.path.isdir(f"{store.root}/run"):
            leftovers += [name for name in os.listdir(f"{store.root}/run") if name != "it"]
        store.put("run/it", b"later")
        assert store.list_folders("") == ["run"]
        store.delete("run/it")
        assert store.list_objects("") == []
        assert store.list_folders("") == []
        store.abort_uploads("", older_than=0.0)
        assert [path for path in Path(store.root).rglob("*") if path.is_file()] == []
    assert leftovers
