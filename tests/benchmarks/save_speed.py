"""A blocking durable save against ``safetensors.torch.save_file`` + fsync, in alternation.

``python tests/benchmarks/save_speed.py [FOLDER] [ROUNDS]``: prints each round and the ratio of
the medians. Digests, index, fence and commit are all in our time; the peer has none of them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import extend_lineage
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import RunRecord, now
from ckpt_tasks.state.capture import capture
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import Position, SaveDecision

TENSORS, MEGABYTES = 60, 300


def main(folder: Path, rounds: int) -> None:
    numel = MEGABYTES * 1_000_000 // TENSORS // 4
    state = {f"layer.{n}.weight": torch.randn(numel // 1000, 1000) for n in range(TENSORS)}
    store, layout = LocalStore(str(folder / "store")), RunLayout("bench")
    run = RunRecord(uid="0" * 32, run="bench", created_at=now(), created_by="bench")
    checkpointer = Checkpointer(
        InlineDrain(JobRunner(store, layout, Fence(store, layout, 1), incremental=False)),
        run,
        1,
        extend_lineage(1, None),
        hyperparameters={},
        environment={},
    )
    ours: list[float] = []
    theirs: list[float] = []
    for step in range(1, rounds + 1):
        theirs.append(_save_file(state, folder / f"peer-{step}.safetensors"))
        started = time.perf_counter()
        request = SaveRequest(position=Position(0, step), decision=SaveDecision("manual", "bench"))
        checkpointer.save(capture({"model": state}), request)
        ours.append(time.perf_counter() - started)
        print(f"round {step}: save_file + fsync {theirs[-1]:.3f} s, ours {ours[-1]:.3f} s")
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"medians: {statistics.median(theirs):.3f} s and {statistics.median(ours):.3f} s")
    print(f"ours / save_file + fsync = {ratio:.2f}")


def _save_file(state: dict[str, torch.Tensor], path: Path) -> float:
    started = time.perf_counter()
    safetensors.torch.save_file(state, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - started


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        main(Path(scratch), int(sys.argv[2]) if len(sys.argv) > 2 else 7)
