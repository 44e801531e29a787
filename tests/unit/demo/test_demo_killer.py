"""The killer of the demo: what it says of a kill is how the store stood when the process died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.launches import wait_until
from support.made_runs import MadeRun
from support.shell import TESTS

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.demo.killer import Killer
from ckpt_tasks.store import open_store

SAVING = """
import itertools
import sys
from support.made_runs import MadeRun
from ckpt_tasks.store import open_store

attempt = MadeRun(open_store(sys.argv[1])).begin()
for step in itertools.count(1):
    attempt.save(step)
"""


def test_the_newest_checkpoint_is_that_of_the_kill(tmp_path: Path) -> None:
    """Checkpoints committed until the very end are counted, so the resume starts from the one
    that was told.
    """
    told: list[tuple[int, str]] = []
    with open_store(str(tmp_path)) as store:
        run = MadeRun(store)
        killer = Killer(
            store,
            run.name,
            kills=1,
            on_kill=lambda number, attempt, pid, newest: told.append((pid, newest)),
        )
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        with subprocess.Popen(command, env=environment) as process:
            killer.start()
            try:
                wait_until(lambda: bool(told), "the kill")
            finally:
                killer.stop()
                process.kill()
        assert told == [(process.pid, str(max(list_checkpoints(store, run.layout))))]
