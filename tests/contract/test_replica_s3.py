"""Copies from a disk to an object store, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_runs import MadeRun, State, Tensor, memory_store
from support.replicas import check_replica, check_whole, committed, contents, kept, run_to_copy
from support.retained_runs import RetainedRun, state_of
from support.s3_servers import S3Server

from ckpt_tasks import tasks
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import StoreError
from ckpt_tasks.replica import adopt, copy
from ckpt_tasks.replica.transfer import PIECE_BYTES
from ckpt_tasks.store import open_store
from ckpt_tasks.testing import Fault, FaultyStore


@pytest.mark.usefixtures("s3_credentials")
def test_there_and_back(seaweedfs: S3Server, tmp_path: Path) -> None:
    """Files of one part, of several, and none that was cut off; adopted there, copied back, the
    run is what it was, and trains on in either place.
    """
    bucket, place = seaweedfs.new_place()
    remote = StoreConfig(url=f"s3://{bucket}/{place}", options={"endpoint_url": seaweedfs.endpoint})
    run = run_to_copy(open_store(str(tmp_path / "here"), for_writing=True))
    large = State({"model": {}}, [Tensor("model", "large", bytes(2 * PIECE_BYTES + 7))])
    run.begin("flow-run-3").save(80, large)
    there = open_store(remote, for_writing=True)
    # The last file: the large one, of which half is uploaded.
    last = Fault(at=_count_files(run), when="during")
    cut = FaultyStore(there, [last], counted={"replace"})
    with pytest.raises(StoreError, match="injected fault during replace"):
        copy(run.store, cut, run.name)
    check_replica(run, there)
    assert len(committed(there, run)) == len(kept(run)) - 1
    assert len(copy(run.store, there, run.name).copied) == 1
    assert committed(there, run) == set(kept(run))
    check_replica(run, there)

    adopt(there, run.name)
    adopted = RetainedRun(open_store(remote, for_writing=True))
    adopted.begin("elsewhere").save(90, state_of(9))
    local = StoreConfig(url=str(tmp_path / "back"))
    assert len(tasks.copy(remote, local, run.name).copied) == len(kept(adopted))
    back = open_store(local, for_writing=True)
    assert contents(back).keys() == contents(there).keys() - _alive(adopted)
    check_whole(back, run.name)
    adopt(back, run.name)
    assert MadeRun(back).begin("third").start == str(kept(adopted)[-1])


def _count_files(run: RetainedRun) -> int:
    """How many files of tensors and indexes a copy of a run writes, but for the last index."""
    target = FaultyStore(memory_store(), counted={"replace"})
    copy(run.store, target, run.name)
    return target.count - 1


def _alive(run: RetainedRun) -> set[str]:
    """Signs of life, which no copy has."""
    attempts = run.paths("attempts")
    return {path for path in attempts if path.endswith(".heartbeat")}
