"""Every store that is shipped keeps the contract of a store."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from support.s3_servers import S3Server

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.store.generic import FsspecStore
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing import FaultyStore, StoreTests, WrapperStore


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(str(tmp_path / "some where" / "root"))

    def set(self, store: Store, path: str, data: bytes) -> None:
        file = Path(store.root) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def get(self, store: Store, path: str) -> bytes:
        return (Path(store.root) / path).read_bytes()

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore(f"contract-{os.urandom(8).hex()}")

    def set(self, store: Store, path: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{store.url}/{path}", data)

    def get(self, store: Store, path: str) -> bytes:
        return fsspec.filesystem("memory").cat_file(f"{store.url}/{path}")

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


class TestGenericStore(StoreTests):
    """A file system that this package knows nothing about."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        filesystem = fsspec.filesystem("dir", path=str(tmp_path), target_protocol="file")
        return FsspecStore(filesystem, "", f"dir://{tmp_path}")

    def set(self, store: Store, path: str, data: bytes) -> None:
        file = self._file(store, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def get(self, store: Store, path: str) -> bytes:
        return self._file(store, path).read_bytes()

    @staticmethod
    def _file(store: Store, path: str) -> Path:
        return Path(store.url.removeprefix("dir://")) / path

    @pytest.mark.skip(reason="fsspec's generic file systems write under the final name")
    def test_put_is_whole_for_readers(self) -> None:
        """No promise of a file system that is not known."""


class S3StoreTests(StoreTests):
    """Subclasses give the fixture `server`."""

    racers = 4
    rounds = 2

    @pytest.fixture
    def store(self, server: S3Server, s3_credentials: dict[str, str]) -> Store:
        self.client = server.client()
        self.bucket, place = server.new_place()
        self.root = f"{place}/some where/root"
        self.config = StoreConfig(
            url=f"s3://{self.bucket}/{self.root}", options={"endpoint_url": server.endpoint}
        )
        return open_store(self.config)

    def set(self, store: Store, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.root}/{path}", Body=data)

    def get(self, store: Store, path: str) -> bytes:
        answer = self.client.get_object(Bucket=self.bucket, Key=f"{self.root}/{path}")
        return answer["Body"].read()

    def reopen(self, store: Store) -> Store:
        return open_store(self.config)


class TestS3OnMoto(S3StoreTests):
    @pytest.fixture
    def server(self, moto_server: S3Server) -> S3Server:
        return moto_server


class TestS3OnSeaweedFS(S3StoreTests):
    @pytest.fixture
    def server(self, seaweedfs: S3Server) -> S3Server:
        return seaweedfs


class TestWrapperStore(TestLocalStore):
    """A wrapper, and a faulty store without faults, change nothing."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        wrapped = FaultyStore(WrapperStore(LocalStore(str(tmp_path / "root"))))
        wrapped.root = str(tmp_path / "root")
        return wrapped
