"""One flipped bit, anywhere in any file of a checkpoint, is found before a tensor is handed out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.made_ranks import plain
from support.made_runs import MadeRun, State, Tensor, memory_store

from ckpt_tasks.checkpointer.lazy import open_checkpoint
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.errors import CorruptCheckpointError
from ckpt_tasks.replica import copy
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(LocalStore(str(tmp_path)))


def _save(run: MadeRun) -> CheckpointId:
    draw = random.Random(0)  # noqa: S311
    tensors = [
        Tensor(item, f"layer.{number}", draw.randbytes(size))
        for item in ("model", "optimizer")
        for number, size in enumerate((1, 0, 4096, 777, 12_345))
    ]
    trees: dict[str, dict[str, object]] = {"model": {}, "optimizer": {}}
    for position, tensor in enumerate(tensors):
        trees[tensor.item][tensor.key] = plain(position)
    return run.begin().save(10, State(trees, tensors))


def _files(root: Path) -> list[Path]:
    """The commit record, the index and the tensor files."""
    run = root / "digits"
    return sorted(path for part in ("commits", "data") for path in (run / part).rglob("*.*"))


def _load(run: MadeRun, checkpoint: CheckpointId) -> None:
    load_checkpoint(run.store, run.layout, read_commit(run.store, run.layout, checkpoint))


def _open(run: MadeRun, checkpoint: CheckpointId) -> None:
    """One tensor after the other, as a person looks at them."""
    record = read_commit(run.store, run.layout, checkpoint)
    trees = open_checkpoint(run.store, run.layout, record).values()
    seen = [tensor.read() for tensors in trees for tensor in tensors.values()]
    assert len(seen) == 10


def _verify(run: MadeRun, checkpoint: CheckpointId) -> None:
    report = verify_checkpoint(run.store, run.name, checkpoint)
    if not report.ok:
        raise CorruptCheckpointError(str(report.problem))


def _copy(run: MadeRun, checkpoint: CheckpointId) -> None:
    if copy(run.store, memory_store(), run.name).damaged:
        raise CorruptCheckpointError("not copied")


@pytest.mark.parametrize("flips", [1000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_every_flipped_bit_is_found(run: MadeRun, tmp_path: Path, flips: int) -> None:
    """Each file gets its share of random flips, whatever its size, and so does each way to read
    them; without any, all is well.
    """
    readers = [_load, _open, _verify, _copy, _load]  # of another number than the files
    checkpoint = _save(run)
    files = _files(tmp_path)
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert len(files) == 4
    draw = random.Random(1)  # noqa: S311
    missed = []
    for number in range(flips):
        path, read = files[number % len(files)], readers[number % len(readers)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(_flipped(whole, place, bit))
        try:
            read(run, checkpoint)
        except CorruptCheckpointError:
            pass
        else:
            missed.append((path.name, place, bit, read.__name__))
        path.write_bytes(whole)
    assert missed == []
    for read in readers:
        read(run, checkpoint)


def _flipped(whole: bytes, place: int, bit: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
