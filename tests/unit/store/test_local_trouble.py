"""What goes wrong with a file system under a store: real faults, and what is said of each."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tasks.errors import NoSpaceError, StoreError
from ckpt_tasks.store._trouble import store_error
from ckpt_tasks.store.local import LocalStore

CHILD = """
import resource, shutil, subprocess, sys
from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.local import LocalStore
folder, fault = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=12", "x", folder], check=True)
store = LocalStore(folder + "/store")
store.create("run/earlier", b"whole")
if fault == "inodes":
    for number in range(20):
        try:
            open(f"{folder}/{number}", "xb").close()
        except OSError:
            break
elif fault == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
elif fault == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
elif fault == "unmounted":
    subprocess.run(["umount", "--lazy", folder], check=True)
size = 2_000_000 if fault == "bytes" else 300_000
for act in (lambda: store.write("run/data/w/x", [bytes(size)], size),
            lambda: store.put("run/beat", bytes(200_000 if fault == "file size" else 5_000_000))):
    try:
        act()
    except StoreError as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError("it was written")
if fault == "unmounted":
    import os
    assert os.listdir(folder) == []
else:
    assert store.read("run/earlier") == b"whole"
    assert [info.path for info in store.list_objects("")] == ["run/earlier"]
"""

SAID = {
    "bytes": "NoSpaceError no space left for {}: 2000000 bytes were needed and ",
    "inodes": "NoSpaceError no space left for {}: the file system of {root} has no free inodes",
    "file size": "StoreError cannot write {}: File too large. A file of 300 kB is more than the "
    "limit of this process (ulimit -f)",
    "read-only": "StoreError cannot write {}: Read-only file system. The file system of {root} has "
    "become read-only",
    "unmounted": "StoreError the store {root} is gone: its file system was unmounted",
}


@pytest.mark.parametrize("fault", SAID)
def test_each_fault_is_named_and_leaves_what_was_there(tmp_path: Path, fault: str) -> None:
    """One line with the path, the cause and what to do; nothing partial, earlier objects whole."""
    enter = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "x", str(tmp_path)]
    if subprocess.run([*enter, *mount], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    done = subprocess.run(
        [*enter, sys.executable, "-c", CHILD, str(tmp_path), fault],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    root = tmp_path / "store"
    first, second = done.stdout.splitlines()
    assert first.startswith(SAID[fault].format(root / "run/data/w/x", root=root))
    assert second.split()[0] == first.split()[0]


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.EDQUOT, NoSpaceError, "have the quota raised"),
        (errno.EACCES, StoreError, f"Give the user with id {os.geteuid()} the permission for /s"),
        (errno.EPERM, StoreError, f"Give the user with id {os.geteuid()} the permission for /s"),
        (errno.EIO, StoreError, "cannot write /s/x: Input/output error"),
    ],
)
def test_each_error_says_what_to_do(number: int, kind: type[StoreError], advice: str) -> None:
    """What only a person can mend names the person's next step."""
    cause = OSError(number, os.strerror(number))
    error = store_error(cause, "write", "/s/x", needed=10, root="/s")
    assert type(error) is kind
    assert "/s/x" in str(error)
    assert advice in str(error)


def test_a_root_is_made_once(tmp_path: Path) -> None:
    """A store that has been there is not made again, by whatever operation."""
    store = LocalStore(str(tmp_path / "root"))
    store.put("run/x", b"1")
    (tmp_path / "root").rename(tmp_path / "away")
    for act in (store.create, store.put):
        with pytest.raises(StoreError, match="is gone"):
            act("run/y", b"2")
    assert os.listdir(tmp_path) == ["away"]
    (tmp_path / "away").rename(tmp_path / "root")
    store.put("run/y", b"2")
    assert store.read("run/y") == b"2"
