"""What the recover step takes of the process that calls it: neither memory nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.made_runs import MadeRun, State, Tensor

from ckpt_tasks.store import open_store
from ckpt_tasks.types import CheckpointId

SIZE = 256 * 2**20

RECOVER = """
import json, re, sys
from pathlib import Path
from ckpt_tasks import tasks
from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.training.spec import TrainSpec

def peak():  # ru_maxrss begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

url, run = sys.argv[1:]
def recover(run):
    config = CheckpointConfig(store=StoreConfig(url=url))
    return tasks.recover(TrainSpec(entrypoint="toy:train", run=run, config=config, invocation="i"))

recover("small")  # imports what is imported late
before = peak()
report = recover(run)
grown = peak() - before
modules = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([report.checkpoint, report.passed_over, grown, sorted(modules)]))
"""


def made_run(url: str, name: str, sizes: list[int]) -> tuple[MadeRun, list[CheckpointId]]:
    """A run whose checkpoints have one tensor each."""
    run = MadeRun(open_store(url), name)
    attempt = run.begin()
    states = [State({"model": {}}, [Tensor("model", "weight", bytes(size))]) for size in sizes]
    return run, [attempt.save(step, state) for step, state in enumerate(states, start=1)]


def test_recover_takes_neither_memory_nor_torch(tmp_path: Path) -> None:
    """Every byte of a large checkpoint is verified in a fifth of its size of memory at most, and
    by a process that has imported neither torch nor numpy: found so by the damage at its end.
    """
    url = str(tmp_path)
    made_run(url, "small", [1])
    run, (older, newer) = made_run(url, "large", [SIZE, SIZE])
    with (tmp_path / run.tensors_path(newer)).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    answer = subprocess.run(
        [sys.executable, "-c", RECOVER, url, "large"], check=True, capture_output=True, text=True
    )
    checkpoint, passed_over, grown, modules = json.loads(answer.stdout)
    assert checkpoint == str(older)
    assert [reason.partition(":")[0] for reason in passed_over] == [str(newer)]
    assert "is damaged: chunk 63" in passed_over[0]
    assert grown < SIZE / 5
    assert not {"torch", "numpy", "mlflow", "prefect"} & set(modules)
