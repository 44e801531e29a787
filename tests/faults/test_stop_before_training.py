"""A signal that comes before training has begun: nothing is claimed, and a later call trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shell import contents

from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_STOPPED

SLOW_TO_IMPORT = """
import signal
import time
from pathlib import Path

came = []
ours = signal.getsignal(signal.SIGTERM)


def note(number, frame):
    came.append(number)
    ours(number, frame)


signal.signal(signal.SIGTERM, note)
Path("importing").touch()
while not came:
    time.sleep(0.01)


def train(run):
    raise AssertionError("stopped before it trains")
"""


def test_a_signal_during_the_import_of_the_users_module_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt ends with 75 before it exists, so a retry is the first."""
    (tmp_path / "slow.py").write_text(SLOW_TO_IMPORT)
    monkeypatch.chdir(tmp_path)
    spec = TrainSpec(
        entrypoint="slow:train",
        run="toy",
        config=CheckpointConfig(store=StoreConfig(url=str(tmp_path / "store"))),
        invocation="flow-run-1",
    )
    outcome = launch(spec, stop_requested=(tmp_path / "importing").exists)
    assert outcome.code == EXIT_STOPPED, outcome
    assert "received SIGTERM" in outcome.message
    assert outcome.attempt is None
    assert contents(tmp_path / "store") == {}
