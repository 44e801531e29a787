"""A supervisor finds out from the store whether its dead trainer was replaced."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.made_runs import MadeRun

from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.store.open import open_store
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.training.supervision.takeover import is_overtaken


def _spec(url: str) -> TrainSpec:
    config = CheckpointConfig(store=StoreConfig(url=url))
    return TrainSpec(entrypoint="toy:train", run="toy", invocation="one", config=config)


def test_a_later_claim_tells(tmp_path: Path) -> None:
    """Each attempt but the newest has been overtaken."""
    run = MadeRun(open_store(str(tmp_path), for_writing=True), "toy")
    run.put_claim(1)
    assert not is_overtaken(_spec(str(tmp_path)), 1)
    run.put_claim(2)
    assert is_overtaken(_spec(str(tmp_path)), 1)
    assert not is_overtaken(_spec(str(tmp_path)), 2)


@pytest.mark.parametrize("url", ["nosuchscheme://bucket", "file/below/a/file"])
def test_a_store_that_cannot_be_asked_tells_nothing(url: str, tmp_path: Path) -> None:
    """The death is told as what it looks like."""
    (tmp_path / "file").touch()
    url = url if "://" in url else str(tmp_path / url)
    assert not is_overtaken(_spec(url), 1)


def test_a_store_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than the limit."""
    answered = threading.Event()
    monkeypatch.setattr(Fence, "check", lambda self: answered.wait())
    assert not is_overtaken(_spec(str(tmp_path)), 1, within=0.05)
    answered.set()
