"""Of many processes that create one object at once, exactly one does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support import store_child
from support.s3_servers import S3Server

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.store import open_store


@contextlib.contextmanager
def racers(config: StoreConfig, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have opened the store and wait for paths to create."""
    command = [sys.executable, store_child.__file__, "race", msgspec.json.encode(config).decode()]
    children = [
        subprocess.Popen(
            [*command, f"racer {who}"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for who in range(number)
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        yield children
    finally:
        for child in children:
            child.stdin.close()
            child.kill()
            child.wait()
            child.stdout.close()


def run_races(config: StoreConfig, *, processes: int, rounds: int) -> None:
    """Let processes race, and check that each race has one winner, whose bytes stand."""
    store = open_store(config)
    with racers(config, processes) as children:
        for number in range(1, rounds + 1):
            path = f"run/attempts/{number:04d}.json"
            for child in children:
                child.stdin.write(f"{path}\n")
                child.stdin.flush()
            answers = [child.stdout.readline().strip() for child in children]
            assert sorted(answers) == ["lost"] * (processes - 1) + ["won"]
            assert store.read(path) == f"racer {answers.index('won')}".encode()


def test_one_process_wins_on_a_local_disk(tmp_path: Path) -> None:
    """Six processes race fifty times for a name on a local file system."""
    run_races(StoreConfig(url=str(tmp_path / "store")), processes=6, rounds=50)


@pytest.mark.usefixtures("s3_credentials")
def test_one_process_wins_on_an_object_store(seaweedfs: S3Server) -> None:
    """Four processes race a few times for a name on a real object store."""
    bucket, place = seaweedfs.new_place()
    config = StoreConfig(url=f"s3://{bucket}/{place}", options={"endpoint_url": seaweedfs.endpoint})
    run_races(config, processes=4, rounds=3)
