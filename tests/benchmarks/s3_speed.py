"""One large file to S3 over a link that is slow per connection: ours against what people do.

``python tests/benchmarks/s3_speed.py [--server sink|seaweedfs] [--rounds N] [--megabytes N]``:
``torch.save`` into ``fs.open`` of s3fs, `Store.write`, and obstore's multipart upload where it is
installed, in alternation, over a link of 80 MB/s a connection and 30 ms a request. Prints each
round, the medians, and the median of the rounds' ratios.

The sink keeps nothing, so what is measured is the client; SeaweedFS on the same machine takes
several times the processor time of the client, and may be what is measured. Before, the link is
measured without its caps: it must be much faster than what goes over it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import s3fs
import torch

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import open_store

if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.s3_link import Link, s3_link
from support.s3_servers import ACCESS_KEY, CREDENTIALS, SECRET_KEY, seaweedfs_server
from support.s3_sink import s3_sink

LINK = Link(delay=0.03, bandwidth=80e6)
BUCKET = "tests"
PEER = "torch.save into fs.open"
OURS = "Store.write"
OBSTORE = "obstore, multipart"

Upload = Callable[[str], None]


def main(server: str, rounds: int, megabytes: int) -> None:
    memory = memoryview(bytearray(os.urandom(megabytes * 1_000_000)))
    with _server(server) as upstream:
        with s3_sink() as sink, s3_link(sink, Link()) as link:
            print(f"the link without caps: {_raw_speed(link.endpoint, memory):.0f} MB/s")
        with s3_link(upstream, LINK) as link:
            _compare(dict(_contestants(link.endpoint, memory)), rounds, memory.nbytes)


def _compare(contestants: dict[str, Upload], rounds: int, size: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):  # the first one warms up
        for name, upload in contestants.items():
            started = time.perf_counter()
            upload(f"{name.split()[0]}-{number}")
            taken = time.perf_counter() - started
            if number:
                seconds[name].append(taken)
                print(f"round {number}: {name} {size / 1e6 / taken:.0f} MB/s")
    for name, times in seconds.items():
        ratios = [peer / own for peer, own in zip(seconds[PEER], times, strict=True)]
        print(
            f"{name}: median {size / 1e6 / statistics.median(times):.0f} MB/s, "
            f"{statistics.median(ratios):.1f} times {PEER}"
        )


def _contestants(endpoint: str, memory: memoryview) -> Iterator[tuple[str, Upload]]:
    filesystem = s3fs.S3FileSystem(endpoint_url=endpoint)
    tensors = {"x": torch.frombuffer(memory, dtype=torch.uint8)}

    def save(key: str) -> None:
        with filesystem.open(f"{BUCKET}/{key}", "wb") as file:
            torch.save(tensors, file)

    yield PEER, save
    store = open_store(StoreConfig(url=f"s3://{BUCKET}/x", options={"endpoint_url": endpoint}))
    yield OURS, lambda key: store.write(key, [memory], memory.nbytes)
    if importlib.util.find_spec("obstore"):
        yield OBSTORE, _obstore(endpoint, memory)


def _obstore(endpoint: str, memory: memoryview) -> Upload:
    import obstore.store

    store = obstore.store.S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def put(key: str) -> None:
        obstore.put(
            store, key, memory, use_multipart=True, chunk_size=8 * 1024 * 1024, max_concurrency=16
        )

    return put


def _raw_speed(endpoint: str, memory: memoryview) -> float:
    """MB/s of one upload by bare sockets."""
    address = urlsplit(endpoint)
    head = f"PUT /tests/x HTTP/1.1\r\nHost: x\r\nContent-Length: {memory.nbytes}\r\n\r\n"
    started = time.perf_counter()
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode())
        connection.sendall(memory)
        connection.recv(1024)
    return memory.nbytes / 1e6 / (time.perf_counter() - started)


@contextlib.contextmanager
def _server(name: str) -> Iterator[str]:
    if name == "sink":
        with s3_sink() as endpoint:
            yield endpoint
    else:
        with tempfile.TemporaryDirectory() as folder, seaweedfs_server(Path(folder)) as server:
            yield server.endpoint


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", choices=("sink", "seaweedfs"), default="sink")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=300)
    main(**vars(parser.parse_args()))
