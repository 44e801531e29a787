"""A checkpoint that claims, and by its sparse file has, far more than any machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.made_runs import HookedStore, MadeRun

from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.errors import ConfigError, CorruptCheckpointError
from ckpt_tasks.format import codec
from ckpt_tasks.format.digest import CHUNK_BYTES, digest
from ckpt_tasks.format.safetensors import TensorSpec, build_header
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId

SIZE = 2**38


def _sealed(fields: dict[str, object]) -> bytes:
    text = json.dumps(fields).encode()[:-1]
    return text + codec._SEAL % digest(text).encode()


def _claim(run: MadeRun, checkpoint: CheckpointId, root: Path) -> None:
    """Header, index and record say the same, and the file is that long; its digests are wrong."""
    file, index = root / run.tensors_path(checkpoint), root / run.index_path(checkpoint)
    header = build_header([TensorSpec("weight", "U8", (SIZE,))], {})
    file.write_bytes(header)
    os.truncate(file, len(header) + SIZE)
    fields = json.loads(index.read_bytes())
    fields["files"][0] |= {"size": len(header) + SIZE, "header_size": len(header)}
    fields["files"][0]["header_digest"] = digest(header)
    chunks = [digest(b"x")] * (SIZE // CHUNK_BYTES)
    place = {"shape": [SIZE], "offset": len(header), "size": SIZE, "chunks": chunks}
    fields["tensors"][0] |= place
    del fields["checksum"]
    index.write_bytes(_sealed(fields))
    commit = root / run.layout.commit(checkpoint)
    record = json.loads(commit.read_bytes())
    del record["checksum"]
    whole = index.read_bytes()
    record["indexes"][0] |= {"size": len(whole), "digest": digest(whole)}
    commit.write_bytes(_sealed(record))


def test_little_is_read_of_a_file_that_claims_to_be_vast(tmp_path: Path) -> None:
    """Nothing after the first chunks that are wrong; and no memory is a clear refusal."""
    run = MadeRun(LocalStore(str(tmp_path)))
    checkpoint = run.begin().save(10)
    _claim(run, checkpoint, tmp_path)
    read: list[str] = []
    store = HookedStore(run.store, lambda operation, path: read.append(path))
    report = verify_checkpoint(store, run.name, checkpoint)
    assert not report.ok
    assert "chunk 0 of tensor 'weight'" in str(report.problem)
    assert len(read) < 150
    with pytest.raises((ConfigError, CorruptCheckpointError), match=r"of memory|chunk 0 of"):
        load_checkpoint(store, run.layout, read_commit(store, run.layout, checkpoint))
    assert len(read) < 300
