"""Google Cloud Storage and Azure Blob Storage: their real clients, and servers on loopback.

What `ckpt_tasks.store.object` says of their conditional creates is shown here. Azure's server comes
by npm (``npm install azurite``); its tests run where ``azurite-blob`` and adlfs are found.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec.config
import pytest
from support.cloud_servers import (
    AzureServer,
    CloudServer,
    azure_connection,
    azure_server,
    gcs_server,
)
from support.s3_link import Link, RunningLink, s3_link

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.store import Store, create_once, deadline, filesystem, open_store, retry
from ckpt_tasks.testing import StoreTests

_AZURITE = shutil.which("azurite-blob")
_AZURE = ["az"] if _AZURITE and importlib.util.find_spec("adlfs") else []
LARGE = random.Random(1).randbytes(12_000_000)  # noqa: S311 - more than one request of a file


@pytest.fixture(scope="module", params=["gs", *_AZURE])
def cloud(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CloudServer]:
    folder = tmp_path_factory.mktemp(request.param)
    running = gcs_server(folder) if request.param == "gs" else azure_server(folder, _AZURITE)
    with running as server:
        yield server


@pytest.fixture(autouse=True)
def credentials(cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """None but those of the server; and the clients' own tries follow one another at once."""
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    for protocol, options in cloud.fsspec_options.items():
        monkeypatch.setitem(fsspec.config.conf, protocol, options)
    if isinstance(cloud, AzureServer):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_connection(cloud.endpoint))
        retries = importlib.import_module("azure.storage.blob.aio").ExponentialRetry
        monkeypatch.setattr(retries, "get_backoff_time", lambda self, settings: 0.01)
    else:
        # Of `min(random.random() + 2 ** tries, 32)` seconds.
        monkeypatch.setattr("gcsfs.retry.min", lambda *seconds: 0.01, raising=False)


class TestCloudStore(StoreTests):
    """The contract of every store."""

    racers = 4
    rounds = 3

    @pytest.fixture
    def store(self, cloud: CloudServer) -> Store:
        self.cloud = cloud
        config = cloud.new_config()
        self.config = StoreConfig(url=f"{config.url}/some where/root", options=config.options)
        return open_store(self.config)

    def set(self, store: Store, path: str, data: bytes) -> None:
        self.cloud.set(self._key(path), data)

    def get(self, store: Store, path: str) -> bytes:
        return self.cloud.get(self._key(path))

    def _key(self, path: str) -> str:
        return f"{self.config.url.split('/', 3)[3]}/{path}"

    def reopen(self, store: Store) -> Store:
        return open_store(self.config)


@pytest.fixture
def config(cloud: CloudServer) -> StoreConfig:
    return cloud.new_config()


@pytest.fixture
def link(cloud: CloudServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningLink]:
    """A link without faults, through which stores that are opened now reach the cloud."""
    with s3_link(cloud.endpoint, Link()) as link:
        if isinstance(cloud, AzureServer):
            connection = azure_connection(link.endpoint)
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield link


class TestLink:
    """At the other end of a link that fails."""

    @pytest.fixture
    def behind(self, config: StoreConfig, credentials: None) -> Iterator[Store]:
        """The same place without the link."""
        with open_store(config) as store:
            store.write("run/data/w/x", [LARGE], len(LARGE))
            yield store

    @pytest.fixture
    def store(
        self,
        behind: Store,
        cloud: CloudServer,
        config: StoreConfig,
        link: RunningLink,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Iterator[Store]:
        monkeypatch.setattr(retry, "_DELAYS", (0.01,) * 4)
        monkeypatch.setattr(deadline, "LEAST_RATE", 1e9)
        with open_store(cloud.through(config, link.endpoint)) as store:
            assert store.size("run/data/w/x") == len(LARGE)  # connected
            yield store

    def test_answers_that_trickle(
        self, store: Store, behind: Store, link: RunningLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each operation ends, and says of what, after how long, and what to look at.

        What was asked may have been done; afterwards the store works as ever.
        """
        link.become(Link(trickle=1.0))
        with monkeypatch.context() as patched:
            patched.setattr(deadline, "BASE_SECONDS", 0.3)
            for act, path in (
                (lambda: store.read("run/data/w/x"), "run/data/w/x"),
                (lambda: store.exists("run/none"), "run/none"),
                (lambda: store.list_objects(""), ""),
                (lambda: store.put("run/put", b"put"), "run/put"),
                (lambda: store.create("run/created", b"ours"), "run/created"),
                (lambda: store.write("run/data/w/y", [LARGE], len(LARGE)), "run/data/w/y"),
                (lambda: store.replace("run/data/w/z", [LARGE], len(LARGE)), "run/data/w/z"),
            ):
                with pytest.raises(StoreError, match="no answer within 0 seconds; see wh") as error:
                    act()
                assert f"{store.url}/{path}".rstrip("/") in str(error.value)
                assert type(error.value) is StoreError
        link.become(Link())
        assert store.read("run/put") == b"put"
        assert create_once(store, "run/created", b"ours") is True
        assert create_once(store, "run/created", b"theirs") is False
        assert store.read_range("run/data/w/x", 5, 50) == LARGE[5:50]
        for name in "yz":
            assert not behind.exists(f"run/data/w/{name}")

    def test_one_answer_trickles(
        self, store: Store, behind: Store, link: RunningLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A request whose answer does not come is sent again, on another connection."""
        monkeypatch.setattr(filesystem, "_TRYING", 100.0)
        behind.put("run/x", b"1")
        for act, answer in (
            (lambda: store.read("run/x"), b"1"),
            (lambda: store.read_range("run/data/w/x", 3, 9), LARGE[3:9]),
            (lambda: len(store.list_objects("run/")), 2),
            (lambda: store.put("run/x", b"2"), None),
            (lambda: create_once(store, "run/y", b"ours", sleep=lambda seconds: None), True),
            (lambda: store.delete("run/x"), None),
        ):
            met = link.fates()["trickle"]
            link.become(Link(trickle=1.0))
            with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
                patched.setattr(deadline, "BASE_SECONDS", 0.5)
                acting = pool.submit(act)
                while link.fates()["trickle"] == met:
                    assert not acting.done()
                link.become(Link())
                patched.undo()
                assert acting.result() == answer
        assert behind.read("run/y") == b"ours"
        assert not behind.exists("run/x")

    def test_busy_for_ever(
        self, store: Store, link: RunningLink, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that refuses all requests is said to be busy, in its own words."""
        link.become(Link(busy=1.0))
        with pytest.raises(StoreError, match="reduce your rate") as error:
            store.read("run/data/w/x")
        assert "run/data/w/x" in str(error.value)

    def test_connections_that_break(self, store: Store, behind: Store, link: RunningLink) -> None:
        """What arrives is whole and one create wins, however often connections break.

        Further tries leave the global generator, which is the training's, alone.
        """
        before = random.getstate()
        link.become(Link(busy=0.1, cut=0.1, drop_answer=0.1, seed=4))
        for number in range(1, 7):
            store.put(f"run/{number}", bytes([number]) * number)
            assert store.read(f"run/{number}") == bytes([number]) * number
            assert store.read_range("run/data/w/x", 0, 900 * number) == LARGE[: 900 * number]
        names = [f"racer {racer}".encode() for racer in range(4)]
        with ThreadPoolExecutor(len(names)) as pool:
            won = list(pool.map(lambda name: create_once(store, "run/a", name), names))
        assert [name for name, ours in zip(names, won, strict=True) if ours] == [
            behind.read("run/a")
        ]
        store.delete("run/1")
        paths = [info.path for info in store.list_objects("run/")]
        assert paths == [*(f"run/{number}" for number in range(2, 7)), "run/a", "run/data/w/x"]
        assert link.fates().keys() >= {"busy", "cut", "drop_answer"}
        assert random.getstate() == before
