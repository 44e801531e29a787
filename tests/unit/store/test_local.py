"""What `LocalStore` promises beyond the contract: durability, and clear errors."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tasks.errors import ConfigError, ObjectExistsError, StoreError
from ckpt_tasks.store import _posix
from ckpt_tasks.store.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "deep" / "root"))


class DirtyModel:
    """Follows system calls; knows which files and directory entries a power cut would lose."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dirty: set[str] = set()
        self.names: dict[int, str] = {}
        for name in ("open", "mkdir", "writev", "pwrite", "fsync", "link", "rename", "unlink"):
            follow = functools.partial(self._follow, name, getattr(os, name))
            monkeypatch.setattr(os, name, follow)

    def _follow(self, name: str, call: Callable, *args, **kwargs):
        result = call(*args, **kwargs)
        folder = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
        if folder is not None:
            base = self.names[folder]
            args = (*(os.path.normpath(f"{base}/{a}") if type(a) is str else a for a in args),)
        if name == "open":
            self.names[result] = str(args[0]).rstrip("/")
            if args[1] & os.O_CREAT:
                self.dirty |= {f"entry {args[0]}", f"data {args[0]}"}
        elif name == "mkdir":
            self.dirty.add(f"entry {args[0]}")
        elif name in ("writev", "pwrite"):
            self.dirty.add(f"data {self.names[args[0]]}")
        elif name in ("link", "rename"):
            source, target = args
            assert f"data {source}" not in self.dirty, "published before its bytes were durable"
            self.dirty.add(f"entry {target}")
        elif name == "fsync":
            synced = self.names[args[0]]
            self.dirty.discard(f"data {synced}")
            self.dirty = {
                item
                for item in self.dirty
                if not (item.startswith("entry ") and os.path.dirname(item[6:]) == synced)
            }
        if name in ("unlink", "rename"):
            self.dirty -= {f"entry {args[0]}", f"data {args[0]}"}
        return result


@pytest.mark.parametrize("operation", ["create", "put", "write"])
def test_all_is_durable_at_return(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """File, entry, and the entries of all new directories are synced, and bytes before names."""
    model = DirtyModel(monkeypatch)
    for path in ("run/data/w1/x", "run/data/w1/y", "run/data/w2/x", "run/z"):
        if operation == "write":
            store.write(path, [b"one", b"two"], 6)
        else:
            getattr(store, operation)(path, b"onetwo")
        assert model.dirty == set()


def test_losing_creator_makes_the_winners_entry_durable(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds an object may rely on it, though its creator died before syncing its entry."""
    store.create("run/x", b"first")
    model = DirtyModel(monkeypatch)
    model.dirty.add(f"entry {store.root}/run/x")
    with pytest.raises(ObjectExistsError):
        store.create("run/x", b"second")
    assert model.dirty == set()


def test_folder_removed_behind_it_is_made_again(store: LocalStore, tmp_path: Path) -> None:
    """A collector that removes empty folders does not stop a writer that knew them."""
    store.create("run/data/w1/x", b"1")
    os.unlink(f"{store.root}/run/data/w1/x")
    for folder in ("run/data/w1", "run/data", "run"):
        os.rmdir(f"{store.root}/{folder}")
    store.create("run/data/w1/x", b"2")
    assert store.read("run/data/w1/x") == b"2"


def fail_with(number: int) -> Callable:
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def test_no_links_falls_back_to_an_exclusive_rename(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hard links `create` is still exclusive, and leaves no temporary file."""
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    store.create("run/x", b"first")
    with pytest.raises(ObjectExistsError):
        store.create("run/x", b"second")
    assert store.read("run/x") == b"first"
    assert os.listdir(f"{store.root}/run") == ["x"]


def test_no_exclusive_publication_is_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that has neither is refused in one line, instead of racing."""
    monkeypatch.setattr(os, "link", fail_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(_posix.ctypes, "get_errno", lambda: errno.EINVAL)
    monkeypatch.setattr(_posix.ctypes, "CDLL", lambda *a, **k: type("C", (), {"renameat2": _fail}))
    with pytest.raises(ConfigError, match="neither hard links nor"):
        store.create("run/x", b"1")
    assert not store.exists("run/x")


def _fail(*args) -> int:
    return -1


TMPFS = """
import os, subprocess, sys
from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.local import LocalStore
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
store = LocalStore(folder + "/root")
store.write("run/data/w1/x", [bytes(500_000)], 500_000)
for act in (
    lambda: store.write("run/data/w2/x", [bytes(400_000), bytes(400_000)], 800_000),
    lambda: store.create("run/commits/x", bytes(800_000)),
    lambda: store.put("run/beat", bytes(800_000)),
):
    try:
        act()
    except StoreError as error:
        assert "800000 bytes were needed" in str(error), error
        assert "no space left" in str(error), error
    else:
        raise AssertionError("it fits")
assert [info.path for info in store.list_objects("")] == ["run/data/w1/x"]
left = [name for _, _, names in os.walk(folder) for name in names]
assert left == ["x"], left
store.write("run/data/w3/x", [bytes(400_000)], 400_000)
"""


def test_full_disk_says_what_is_missing_and_cleans_up(tmp_path: Path) -> None:
    """On a real full file system: what was needed, nothing partial left, and usable afterwards."""
    enter = ["unshare", "--map-root-user", "--mount"]
    mountable = subprocess.run([*enter, "mount", "-t", "tmpfs", "x", str(tmp_path)], check=False)
    if mountable.returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    done = subprocess.run(
        [*enter, sys.executable, "-c", TMPFS, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_failed_sync_is_no_success(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses to sync, nothing claims to be written, and no object is left."""
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    for act in (
        lambda: store.create("run/x", b"1"),
        lambda: store.put("run/x", b"1"),
        lambda: store.write("run/x", [b"1"], 1),
    ):
        with pytest.raises(StoreError, match="Input/output error"):
            act()
    assert not store.exists("run/x")


def test_short_writes_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take only some of the bytes at a time; none are lost or doubled."""
    writev = os.writev

    def stingy(descriptor, views):
        whole = b"".join(views)
        return writev(descriptor, [whole[: max(1, min(len(whole), 777))]])

    monkeypatch.setattr(os, "writev", stingy)
    parts = [bytes([n % 251]) * (n % 40) for n in range(3000)]
    store.write("run/x", parts, sum(map(len, parts)))
    assert store.read("run/x") == b"".join(parts)


def test_listing_survives_deletions(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object deleted while the store is listed is left out, and is no error."""
    for name in "abc":
        store.put(f"run/{name}", b"1")
    scandir = os.scandir

    def slow(folder):
        entries = scandir(folder)
        if "b" in os.listdir(folder):
            os.unlink("b", dir_fd=folder)
        return entries

    monkeypatch.setattr(os, "scandir", slow)
    paths = [info.path for info in store.list_objects("")]
    assert paths in (["run/a", "run/c"], ["run/a", "run/b", "run/c"])
    assert "run/b" not in paths


def test_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A root that is a file is a mistake in the configuration, said in one line."""
    (tmp_path / "file").write_text("x")
    for root in ("file", "file/below"):
        with pytest.raises(ConfigError, match="cannot be written"):
            LocalStore(str(tmp_path / root)).check_writable()


def test_read_only_place_is_refused(tmp_path: Path) -> None:
    """A root on a read-only file system is refused before any training, naming the place."""
    enter = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "x", str(tmp_path)]
    if subprocess.run([*enter, *mount], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    code = (
        "import subprocess, sys\n"
        f"subprocess.run({mount!r}, check=True)\n"
        "from ckpt_tasks.store import open_store\n"
        "open_store(sys.argv[1], for_writing=True)\n"
    )
    done = subprocess.run(
        [*enter, sys.executable, "-c", code, str(tmp_path / "root")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "ConfigError" in done.stderr.splitlines()[-1]
    assert "read-only" in done.stderr.splitlines()[-1]


def test_unreadable_object_names_itself(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system comes as `StoreError` with the path and the system's words."""
    store.put("run/x", b"1")
    monkeypatch.setattr(os, "open", fail_with(errno.EACCES))
    with pytest.raises(StoreError, match=r"cannot read .*/run/x: Permission denied"):
        store.read("run/x")


def test_object_in_the_way_of_a_folder_is_named(store: LocalStore) -> None:
    """Writing below an object fails, and is not mistaken for an object that is missing."""
    store.create("run/x", b"1")
    for act in (store.create, store.put):
        with pytest.raises(StoreError, match=r"cannot .*/run/x/y: Not a directory") as caught:
            act("run/x/y", b"2")
        assert type(caught.value) is StoreError


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_who_may_read_is_for_the_umask_to_say(
    store: LocalStore, umask: int, file: int, folder: int
) -> None:
    """A store may be a group's or one person's own; nothing may be executed."""
    before = os.umask(umask)
    try:
        store.create("run/a", b"1")
        store.put("run/b", b"1")
        store.write("run/data/w/c", [b"1"], 1)
    finally:
        os.umask(before)
    for path in Path(store.root).rglob("*"):
        assert path.stat().st_mode & 0o7777 == (folder if path.is_dir() else file), path


def test_relative_root_is_refused() -> None:
    """A root must be absolute, for the working directory may change."""
    with pytest.raises(ConfigError, match="not absolute"):
        LocalStore("relative/root")


def test_what_a_killed_replace_leaves_is_found_by_its_age(store: LocalStore) -> None:
    """No listing shows it; `abort_uploads` removes it once it has not been written to for so long,
    and leaves files alone, and what lies elsewhere.
    """
    store.replace("run/data/w/x", [b"old"], 3)
    folder = Path(store.root) / "run/data/w"
    left, fresh = folder / f".tmp-{'0' * 32}", folder / f".tmp-{'1' * 32}"
    for path in (left, fresh):
        path.write_bytes(b"half of it")
    hour_ago = time.time() - 3600
    for path in (left, folder / "x"):
        os.utime(path, (hour_ago, hour_ago))
    assert [info.path for info in store.list_objects("")] == ["run/data/w/x"]
    assert store.abort_uploads("another/", 60) == []
    told = store.list_uploads("run/", 60)
    assert (left.exists(), store.list_uploads("another/", 60)) == (True, [])
    [aborted] = store.abort_uploads("run/", 60)
    assert (told, store.list_uploads("run/", 60)) == ([aborted], [])
    assert (aborted.path, aborted.begun) == (f"run/data/w/{left.name}", pytest.approx(hour_ago))
    assert (left.exists(), fresh.exists(), store.read("run/data/w/x")) == (False, True, b"old")
