"""One flipped bit, anywhere in any file of a checkpoint, is found before a tensor is handed out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.made_runs import MadeRun, State, Tensor

from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit
from ckpt_tasks.errors import CorruptCheckpointError
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
    return run.begin().save(10, State({"model": {}, "optimizer": {}}, tensors))


def _files(root: Path) -> list[Path]:
    """The commit record, the index and the tensor files."""
    run = root / "digits"
    return sorted(path for part in ("commits", "data") for path in (run / part).rglob("*.*"))


@pytest.mark.parametrize("flips", [1000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_every_flipped_bit_is_found(run: MadeRun, tmp_path: Path, flips: int) -> None:
    """Each file gets its share of random flips, whatever its size; without any, all is well."""
    checkpoint = _save(run)
    files = _files(tmp_path)
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert len(files) == 4
    draw = random.Random(1)  # noqa: S311
    missed = []
    for number in range(flips):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(_flipped(whole, place, bit))
        try:
            load_checkpoint(run.store, run.layout, read_commit(run.store, run.layout, checkpoint))
        except CorruptCheckpointError:
            pass
        else:
            missed.append((path.name, place, bit))
        path.write_bytes(whole)
    assert missed == []
    load_checkpoint(run.store, run.layout, read_commit(run.store, run.layout, checkpoint))


def _flipped(whole: bytes, place: int, bit: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
