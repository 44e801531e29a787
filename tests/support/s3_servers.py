"""S3 servers for tests, on free ports of the loopback interface, ended by process group."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"  # noqa: S105 - of a server that lives as long as the tests

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3Server:
    """A running server; `new_place` gives a test a place of its own."""

    endpoint: str
    bucket: str = "tests"
    environment: dict[str, str] = field(default_factory=lambda: dict(CREDENTIALS))

    def client(self):
        """A boto3 client, for tests to look behind the store under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=botocore.config.Config(read_timeout=60, s3={"addressing_style": "path"}),
        )

    def new_place(self) -> tuple[str, str]:
        """A bucket that exists, and a prefix in it that is not used.

        The bucket is shared: a new one costs SeaweedFS seconds and several of its volumes.
        """
        return self.bucket, f"place-{uuid.uuid4().hex[:12]}"


def free_port(*, also: int = 0) -> int:
    """A port that nothing listens on, nor on the one `also` higher."""
    chooser = random.Random(os.urandom(8))  # noqa: S311 - not a secret
    while True:
        port = chooser.randrange(20000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in {port, port + also}:
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", number))
            return port


@contextlib.contextmanager
def process_group(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a server in a session of its own; at the end, end all of it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(ready, process: subprocess.Popen, log: Path, timeout: float = 90.0) -> None:
    """Poll `ready` until it holds; raises with the server's log if it does not."""
    deadline = time.monotonic() + timeout
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}"
            )
        time.sleep(0.05)


def answers(port: int, path: str) -> bool:
    """Whether a GET of `path` is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """The emulator `moto`, which honours conditions and keeps all in memory."""
    port = free_port()
    log = folder / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process_group(command, log) as process:
        wait_until(lambda: answers(port, "/moto-api/"), process, log)
        server = S3Server(f"http://127.0.0.1:{port}")
        server.client().create_bucket(Bucket=server.bucket)
        yield server


@contextlib.contextmanager
def seaweedfs_server(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS, a real object store; its first write, which takes seconds, is done here."""
    ports = {name: free_port(also=10_000) for name in ("master", "volume", "filer", "s3")}
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [
        *(str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder / 'data'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.telemetry=false"),
        # Else fixed ports, which two servers cannot share.
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{name}.port={port}" for name, port in ports.items()),
        f"-s3.config={folder / 's3.json'}",
        *("-master.volumeSizeLimitMB=64", "-volume.max=100"),
    ]
    log = folder / "weed.log"
    with process_group(command, log) as process:
        wait_until(lambda: answers(ports["s3"], "/healthz"), process, log)
        server = S3Server(f"http://127.0.0.1:{ports['s3']}")
        wait_until(lambda: _accepts_a_write(server), process, log)
        yield server


def _accepts_a_write(server: S3Server) -> bool:
    client = server.client()
    try:
        with contextlib.suppress(client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=server.bucket)
        client.put_object(Bucket=server.bucket, Key="warm-up", Body=b"x")
        client.delete_object(Bucket=server.bucket, Key="warm-up")
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
        return False
    return True
