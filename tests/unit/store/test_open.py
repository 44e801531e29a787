"""URLs, paths and options of a store, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec import register_implementation
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.store import open_store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.store.memory import MemoryStore


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("/a/b", "/a/b"),
        ("/a//b/../c/", "/a/c"),
        ("/a b/ü%20", "/a b/ü%20"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("rel/x", "{cwd}/rel/x"),
        ("file:rel", "{cwd}/rel"),
        ("with:colon", "{cwd}/with:colon"),
        ("~/x", "{home}/x"),
        ("file://~/x", "{home}/x"),
    ],
)
def test_paths(url: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and ``file:`` URLs open a local store at an absolute place, taken literally."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    store = open_store(url)
    assert isinstance(store, LocalStore)
    assert store.root == root.format(cwd=tmp_path, home="/home/somebody")
    assert open_store(store.url).root == store.root


def test_opening_makes_nothing(tmp_path: Path) -> None:
    """Opening a store to read does not make its folder; opening it to write does."""
    open_store(str(tmp_path / "s")).list_objects("")
    assert os.listdir(tmp_path) == []
    open_store(str(tmp_path / "s"), for_writing=True)
    assert os.listdir(tmp_path / "s") == []


@pytest.mark.parametrize("url", ["memory://a/b", "memory:a/b", "memory:///a/b/"])
def test_memory(url: str) -> None:
    """All spellings of a place in memory are the same store."""
    store = open_store(url, for_writing=True)
    assert isinstance(store, MemoryStore)
    assert store.url == "memory://a/b"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("  ", "empty"),
        ("memory://", "needs a name"),
        ("file://", "path"),
        ("file://host/x", "file:///host/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("s3://", "bucket"),
        ("nosuch://x/y", "nosuch"),
        ("simplecache::s3://b/x", "chains"),
    ],
)
def test_wrong_urls(url: str, says: str) -> None:
    """What cannot be meant is refused, and the message says what was or should be written."""
    with pytest.raises(ConfigError, match=says):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "file://me:hush-hush@host/x",
        "s3:me:hush-hush@bucket/x",
        "s3:////me:hush-hush@bucket/x",
        "s3://me:hush-hush@bucket/x",
        "memory://me:hush-hush@x",
        "simplecache::s3://me:hush-hush@b/x",
        "nosuch://me:hush-hush@b/x",
    ],
)
def test_credentials_in_wrong_urls_are_not_shown(url: str) -> None:
    """However a URL is mistaken, the message that says so masks its userinfo."""
    with pytest.raises(ConfigError) as caught:
        open_store(StoreConfig(url=url, options={"endpoint_url": "http://h"}))
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize("option", ["key", "secret", "token", "password", "client_secret"])
def test_credentials_in_options_are_refused(option: str) -> None:
    """Credentials come from the environment; the message shows the name and not the value."""
    with pytest.raises(ConfigError, match=option) as caught:
        open_store(StoreConfig(url="s3://b/x", options={option: "hush-hush"}))
    assert "hush-hush" not in str(caught.value)


def test_credentials_in_a_url_are_masked() -> None:
    """Userinfo in a URL does not appear in the error that refuses it."""
    with pytest.raises(ConfigError) as caught:
        open_store("s3://name:hush-hush@bucket/x")
    assert "hush-hush" not in str(caught.value)


def test_options_on_a_path_are_refused() -> None:
    """Options that nothing reads are a mistake."""
    with pytest.raises(ConfigError, match="endpoint_url"):
        open_store(StoreConfig(url="/x", options={"endpoint_url": "http://h"}))


def test_unknown_option_is_refused() -> None:
    """An option that the file system does not know is refused, naming it and the store."""
    config = StoreConfig(url="s3://bucket/x", options={"nosuch_option": 1})
    with pytest.raises(ConfigError, match=r"s3://bucket/x.*nosuch_option"):
        open_store(config)


def test_generic_file_system_needs_a_single_writer(tmp_path: Path) -> None:
    """A file system without conditional create is written only when declared single-writer."""

    class Generic(DirFileSystem):
        protocol = "ckptgeneric"

        def __init__(self, **options: object) -> None:
            super().__init__(path=str(tmp_path), fs=LocalFileSystem(), **options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix("ckptgeneric://").rpartition("@")[2]

    register_implementation("ckptgeneric", Generic, clobber=True)
    store = open_store("ckptgeneric://root")
    assert not store.supports_conditional_create
    with pytest.raises(ConfigError, match="single_writer = true"):
        open_store("ckptgeneric://root", for_writing=True)
    config = StoreConfig(url="ckptgeneric://root", single_writer=True)
    open_store(config, for_writing=True).create("run/x", b"1")
    assert open_store("ckptgeneric://name:hush@root").url == "ckptgeneric://***@root"
    assert (tmp_path / "root" / "run" / "x").read_bytes() == b"1"


def test_missing_package_names_the_extra() -> None:
    """Without s3fs the message says what to install."""
    code = (
        "import sys\n"
        "sys.modules['s3fs'] = None\n"
        "from ckpt_tasks.store import open_store\n"
        "open_store('s3://bucket/x')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "ckpt-tasks[s3]" in done.stderr.splitlines()[-1]


def test_local_store_imports_nothing_heavy() -> None:
    """Opening a local store, as ``ls`` does, imports no file system library and no torch."""
    code = (
        "import sys\n"
        "from ckpt_tasks.store import open_store\n"
        "open_store('/nowhere').list_objects('')\n"
        "print([m for m in ('fsspec', 's3fs', 'torch', 'numpy', 'mlflow') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
