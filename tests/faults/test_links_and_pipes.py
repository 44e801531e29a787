"""What others put into a store in the place of its files and folders: links, pipes, mazes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.made_runs import MadeRun
from support.retained_runs import RetainedRun, state_of

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.marks import marked
from ckpt_tasks.errors import (
    CkptTasksError,
    ConfigError,
    CorruptCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from ckpt_tasks.store.local import LocalStore


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is none of the store's, with a file."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "x").write_bytes(b"none of yours")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path / "root"))
    store.create("run/data/w1/y", b"ours")
    return store


def test_nothing_is_read_written_listed_or_deleted_through_a_link(
    store: LocalStore, outside: Path
) -> None:
    """In the place of a file, of a folder, or of a whole run."""
    root = Path(store.root)
    (root / "run/data/w1/x").symlink_to(outside / "x")
    (root / "run/data/w2").symlink_to(outside)
    (root / "other").symlink_to(outside)
    (root / "run/hung").symlink_to("nowhere")
    for path in ("run/data/w1/x", "run/data/w2/x", "other/x", "run/hung"):
        reads: list[Callable[[str], object]] = [
            store.read,
            store.size,
            store.map,
            lambda path: store.read_range(path, 0, 1),
            lambda path: store.read_into(path, 0, 1, memoryview(bytearray(1))),
        ]
        for read in reads:
            with pytest.raises(CorruptCheckpointError, match="is a symbolic link, and no link"):
                read(path)
    for folder in ("run/data/w2", "other"):
        changes: list[Callable[[], object]] = [
            lambda path=f"{folder}/z": store.create(path, b"1"),
            lambda path=f"{folder}/z": store.put(path, b"1"),
            lambda path=f"{folder}/z": store.write(path, [b"1"], 1),
            lambda path=f"{folder}/z/deep": store.create(path, b"1"),
            lambda path=f"{folder}/x": store.delete(path),
            lambda path=f"{folder}/": store.list_objects(path),
            lambda path=f"{folder}/": store.list_folders(path),
        ]
        for change in changes:
            with pytest.raises(ConfigError, match="is a symbolic link, and no link"):
                change()
    assert [info.path for info in store.list_objects("")] == ["run/data/w1/y"]
    assert (store.list_folders(""), store.list_folders("run/data/")) == (["run"], ["w1"])
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"x": b"none of yours"}


def test_name_that_a_link_has_is_taken_and_its_own_to_give(
    store: LocalStore, outside: Path
) -> None:
    """So nobody claims it behind a link; a `put` or `delete` replaces the link, not its target."""
    for name in ("claim", "beat", "gone"):
        Path(store.root, "run", name).symlink_to(outside / "x")
    assert store.exists("run/claim")
    with pytest.raises(ObjectExistsError):
        store.create("run/claim", b"mine")
    store.put("run/beat", b"alive")
    store.delete("run/gone")
    assert store.read("run/beat") == b"alive"
    assert not os.path.lexists(f"{store.root}/run/gone")
    assert (outside / "x").read_bytes() == b"none of yours"


def test_root_may_lie_behind_links(store: LocalStore, tmp_path: Path) -> None:
    """Where the store is, its user decides."""
    (tmp_path / "link").symlink_to(store.root)
    behind = LocalStore(str(tmp_path / "link"))
    behind.create("run/data/w2/x", b"1")
    assert store.read("run/data/w2/x") == b"1"
    assert len(behind.list_objects("")) == 2


def test_what_is_no_regular_file_is_no_object(store: LocalStore) -> None:
    """Reading a pipe would wait for ever, and a device never ends."""
    run = Path(store.root, "run")
    os.mkfifo(run / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        place = os.open(run, os.O_PATH)
        server.bind(f"/proc/self/fd/{place}/socket")  # the path itself may be too long
        os.close(place)
    for name in ("pipe", "data"):
        for read in (store.read, store.map, store.size):
            with pytest.raises(ObjectNotFoundError):
                read(f"run/{name}")
        assert not store.exists(f"run/{name}")
    with pytest.raises(OSError, match="cannot read"):
        store.read("run/socket")
    assert [info.path for info in store.list_objects("run/")] == ["run/data/w1/y"]


def test_maze_of_folders_is_not_walked(store: LocalStore) -> None:
    """It would take quadratic time, or the stack; no store's own folders are nested like that."""
    place = Path(store.root, "run", *["deep"] * 100)
    place.mkdir(parents=True)
    for list_all in (store.list_objects, store.list_folders):
        with pytest.raises(ConfigError, match="nested more than 64 deep"):
            list_all("")
    assert len(store.list_objects("run/data/")) == 1


def test_linked_files_are_damage(tmp_path: Path) -> None:
    """Of one checkpoint: it is quarantined, and the one before it is taken."""
    run = MadeRun(LocalStore(str(tmp_path / "root")))
    first = run.begin()
    older, linked = first.save(10), first.save(20)
    file = tmp_path / "root" / run.tensors_path(linked)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert run.begin().start == str(older)
    assert marked(run.store, run.layout)["quarantined"] == {linked}


@pytest.mark.parametrize("folder", ["attempts", "commits", "marks", "data", ""])
def test_linked_folders_of_a_run_stop_it(tmp_path: Path, folder: str) -> None:
    """A run that is somewhere else after all is refused, and nothing in it changes."""
    run = MadeRun(LocalStore(str(tmp_path / "root")))
    run.begin().save(10)
    run.store.put(f"{run.name}/marks/x", b"")
    place = tmp_path / "root" / run.name / folder
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(CkptTasksError, match="is a symbolic link"):
        run.begin().save(20)
    if folder != "data":
        with pytest.raises(CkptTasksError, match="is a symbolic link"):
            view_run(run.store, run.name)
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


def test_collection_deletes_nothing_outside(tmp_path: Path, outside: Path) -> None:
    """An expired checkpoint whose folder leads elsewhere, to files of the very same names."""
    run = RetainedRun(LocalStore(str(tmp_path / "root")))
    attempt = run.begin()
    saved = [attempt.save(10 * n, state_of(n, frozen=n)) for n in (1, 2, 3)]
    folder = (tmp_path / "root" / run.tensors_path(saved[0])).parent
    names = {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        path.rename(outside / path.name)
    folder.rmdir()
    folder.symlink_to(outside)
    run.expire(latest=1)
    run.aged.age(2 * 3600.0)
    assert run.collect().removed == [str(saved[0]), str(saved[1])]
    assert {path.name for path in outside.iterdir()} == {"x", *names}
    assert [record.sequence for record in run.left()] == [3]
