"""A real object store at the other end of a slow and flaky link; writers that are killed."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from support import s3_child
from support.s3_link import FATES, Link, RunningLink, s3_link
from support.s3_servers import S3Server

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import Store, create_once, deadline, open_store, retry, s3_upload

pytestmark = pytest.mark.usefixtures("s3_credentials")

FLAKY = Link(
    delay=0.01, bandwidth=80e6, busy=0.08, cut=0.08, drop_answer=0.08, corrupt=0.08, seed=7
)
BYTES = 22 * 1024 * 1024 + 1  # three parts
RANGE_BYTES = 5_000_000


def config_of(server: S3Server, endpoint: str) -> StoreConfig:
    bucket, place = server.new_place()
    return StoreConfig(url=f"s3://{bucket}/{place}", options={"endpoint_url": endpoint})


def through(store: Store, link: RunningLink) -> StoreConfig:
    """The same place at the other end of a link."""
    return StoreConfig(url=store.url, options={"endpoint_url": link.endpoint})


def uploads_left(server: S3Server, store: Store) -> list[str]:
    """Paths of uploads that are neither completed nor aborted, seen without the store."""
    bucket, _, place = store.url.removeprefix("s3://").partition("/")
    listed = server.client().list_multipart_uploads(Bucket=bucket, Prefix=f"{place}/")
    keys = [upload["Key"] for upload in listed.get("Uploads", [])]
    return sorted(key.removeprefix(f"{place}/") for key in keys)


def wait_for(holds: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """The test's own time-out ends a wait for what never comes."""
    while not holds():
        assert process is None or process.poll() is None
        time.sleep(0.1)


class TestFlakyLink:
    """Nearly a third of all requests are refused, cut, changed, or acted upon without an answer."""

    @pytest.fixture
    def link(self, seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningLink]:
        """More and quicker tries than usual, so that chance does not end a test."""
        monkeypatch.setattr(retry, "_DELAYS", (0.01,) * 10)
        with s3_link(seaweedfs.endpoint, FLAKY) as link:
            yield link

    @pytest.fixture
    def store(self, seaweedfs: S3Server, link: RunningLink) -> Iterator[Store]:
        with open_store(config_of(seaweedfs, link.endpoint)) as store:
            yield store

    def test_files_arrive_whole(self, seaweedfs: S3Server, link: RunningLink, store: Store) -> None:
        """Files of several parts have the right bytes, whole and in ranges, and no upload is left.

        They are written until each kind of fault was met.
        """
        written = {}
        for number in itertools.count(1):
            content = random.Random(number).randbytes(BYTES)  # noqa: S311
            path = f"run/data/w{number}/x"
            store.write(path, [memoryview(content)[:4096], memoryview(content)[4096:]], BYTES)
            written[path] = hashlib.sha256(content).digest()
            if number >= 3 and link.fates().keys() >= {*FATES} - {"trickle"}:
                break
        behind = open_store(
            StoreConfig(url=store.url, options={"endpoint_url": seaweedfs.endpoint})
        )
        for path, digest in written.items():
            assert hashlib.sha256(behind.read(path)).digest() == digest
            assert hashlib.sha256(self._read_in_ranges(store, path)).digest() == digest
        assert uploads_left(seaweedfs, store) == []
        assert [info.path for info in behind.list_objects("")] == sorted(written)
        behind.close()

    @staticmethod
    def _read_in_ranges(store: Store, path: str) -> bytearray:
        """As a load does: by several threads, each into its place."""
        content = bytearray(BYTES)
        view = memoryview(content)

        def read(start: int) -> None:
            stop = min(start + RANGE_BYTES, BYTES)
            store.read_into(path, start, stop, view[start:stop])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(0, BYTES, RANGE_BYTES)))
        return content

    def test_one_create_wins(self, store: Store) -> None:
        """Of several that create one object, exactly one is told that it is its own."""
        for number in range(3):
            path = f"run/attempts/{number:04d}.json"
            names = [f"racer {racer}".encode() for racer in range(4)]
            with ThreadPoolExecutor(len(names)) as pool:
                won = list(pool.map(lambda name, path=path: create_once(store, path, name), names))
            assert [name for name, ours in zip(names, won, strict=True) if ours] == [
                store.read(path)
            ]


class TestTrickle:
    """Answers that come a byte at a time, so that no wait for the next one is ever long."""

    CONTENT = random.Random(1).randbytes(3_000_000)  # noqa: S311

    @pytest.fixture(autouse=True)
    def impatience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retry, "_DELAYS", (0.01,) * 4)
        monkeypatch.setattr(deadline, "GRACE_SECONDS", 1.0)
        monkeypatch.setattr(deadline, "BASE_SECONDS", 2.0)

    @pytest.fixture
    def behind(self, seaweedfs: S3Server) -> Iterator[Store]:
        """The same place without the link."""
        with open_store(config_of(seaweedfs, seaweedfs.endpoint)) as store:
            store.write("run/data/w/x", [self.CONTENT], len(self.CONTENT))
            yield store

    def test_some(self, seaweedfs: S3Server, behind: Store) -> None:
        """A quarter of all answers trickle: what was cut off goes on, and bytes are right."""
        with s3_link(seaweedfs.endpoint, Link(trickle=0.25, seed=3)) as link:
            with open_store(through(behind, link)) as store:
                assert store.read_range("run/data/w/x", 5, 2_000_005) == self.CONTENT[5:2_000_005]
                store.write("run/data/w/y", [self.CONTENT], len(self.CONTENT))
            assert link.fates()["trickle"] > 0
        assert behind.read("run/data/w/y") == self.CONTENT

    def test_all(self, seaweedfs: S3Server, behind: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where all do, each operation ends, and says of what, how slow, and what to look at."""
        with s3_link(seaweedfs.endpoint, Link()) as link:
            store = open_store(through(behind, link))
            monkeypatch.setattr(retry, "_DELAYS", (0.01,))
            monkeypatch.setattr(deadline, "BASE_SECONDS", 1.0)
            link.become(Link(trickle=1.0))
            for act, path, says in (
                (
                    lambda: store.read_range("run/data/w/x", 0, 9_000),
                    "w/x",
                    "came through in",
                ),
                (lambda: store.size("run/data/w/x"), "run/data/w/x", "within 1 seconds"),
                (lambda: store.list_objects(""), store.url, "see whether the network"),
                (lambda: store.replace("run/y", [b"y"], 1), "run/y", "within 1 seconds"),
            ):
                with pytest.raises(StoreError, match=says) as caught:
                    act()
                assert path in str(caught.value)
                assert type(caught.value) is StoreError
            store.close()
        assert behind.read("run/y") == b"y"

    def test_slow_upload(
        self, seaweedfs: S3Server, behind: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parts that hardly get on are given up, and nothing of them is left."""
        monkeypatch.setattr(deadline, "LEAST_RATE", 1e9)
        size = 16 * len(self.CONTENT)
        monkeypatch.setattr(retry, "_DELAYS", (0.01,))
        with s3_link(seaweedfs.endpoint, Link(bandwidth=200e3)) as link:
            store = open_store(through(behind, link))
            with pytest.raises(StoreError, match=r"run/data/w/y.*bytes came through in"):
                store.write("run/data/w/y", [self.CONTENT] * 16, size)
            store.close()
        assert [info.path for info in behind.list_objects("")] == ["run/data/w/x"]
        assert uploads_left(seaweedfs, behind) == []


class TestKilledWriter:
    """A process that ends in the midst of an upload, so that nobody aborts it."""

    @pytest.fixture
    def store(self, seaweedfs: S3Server) -> Iterator[Store]:
        with open_store(config_of(seaweedfs, seaweedfs.endpoint)) as store:
            yield store

    @staticmethod
    def killed_write(server: S3Server, store: Store, path: str) -> None:
        """Write over a slow link, and die when the upload has begun."""
        with s3_link(server.endpoint, Link(bandwidth=1e6)) as link:
            config = StoreConfig(url=store.url, options={"endpoint_url": link.endpoint})
            command = [sys.executable, s3_child.__file__, "write", _json(config), path]
            with subprocess.Popen([*command, str(64 * 1024 * 1024)]) as writer:
                wait_for(lambda: path in uploads_left(server, store), writer)
                writer.kill()

    def test_its_upload_is_found_and_removed(self, seaweedfs: S3Server, store: Store) -> None:
        """What is old enough is aborted and told; what is younger, or lies elsewhere, is not."""
        bucket, _, place = store.url.removeprefix("s3://").partition("/")
        self.killed_write(seaweedfs, store, "run/data/w1/x")
        seaweedfs.client().create_multipart_upload(Bucket=bucket, Key=f"{place}/other/data/w/y")
        time.sleep(8)
        seaweedfs.client().create_multipart_upload(Bucket=bucket, Key=f"{place}/run/data/w2/x")
        made = time.monotonic()

        def between() -> float:
            """Older than the younger one is now, and younger than the older one."""
            return time.monotonic() - made + 5

        assert store.abort_uploads("run/", older_than=3600) == []
        told = store.list_uploads("run/", older_than=between())
        aborted = store.abort_uploads("run/", older_than=between())
        assert (told, store.list_uploads("run/", older_than=between())) == (aborted, [])
        assert [upload.path for upload in aborted] == ["run/data/w1/x"]
        assert uploads_left(seaweedfs, store) == ["other/data/w/y", "run/data/w2/x"]
        assert not store.exists("run/data/w1/x")
        wait_for(lambda: store.abort_uploads("", older_than=0))
        assert store.abort_uploads("", older_than=0) == []

    def test_many_uploads_are_all_found(
        self, seaweedfs: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many there are, and in however many answers the server lists them."""
        monkeypatch.setattr(s3_upload, "_LISTED_AT_ONCE", 2)
        bucket, _, place = store.url.removeprefix("s3://").partition("/")
        paths = [f"run/data/w{number}/x" for number in range(5)]
        for path in paths:
            seaweedfs.client().create_multipart_upload(Bucket=bucket, Key=f"{place}/{path}")
        time.sleep(2.1)  # their ages are whole seconds
        aborted = store.abort_uploads("run/", older_than=1)
        assert [upload.path for upload in aborted] == paths
        assert uploads_left(seaweedfs, store) == []

    def test_write_again(self, seaweedfs: S3Server, store: Store) -> None:
        """An abandoned upload is no object, and does not stop another write."""
        self.killed_write(seaweedfs, store, "run/data/w1/x")
        assert store.list_objects("") == []
        store.write("run/data/w1/x", [b"bytes"], 5)
        assert store.read("run/data/w1/x") == b"bytes"


@pytest.mark.parametrize("one_piece", [False, True])
def test_memory_is_bounded_by_the_parts_under_way(seaweedfs: S3Server, one_piece: bool) -> None:
    """A file many times larger than the parts under way takes no more memory than they do.

    What lies in one piece of memory is not copied; the rest of the bound is the network's.
    """
    config = config_of(seaweedfs, seaweedfs.endpoint)
    size = 160 * 1024 * 1024
    done = subprocess.run(
        [sys.executable, s3_child.__file__, "memory", _json(config), str(size), str(one_piece)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 2 * (s3_child.IN_FLIGHT + 1) * s3_child.PART_BYTES


def _json(config: StoreConfig) -> str:
    return msgspec.json.encode(config).decode()
