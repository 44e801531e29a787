"""A command line called in this process, and a store to call it on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from support.commands import Call, Stored
from support.made_runs import MadeRun
from support.shell import Answer

from ckpt_tasks.cli import main
from ckpt_tasks.store import open_store


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run ``ckpt-tasks ARGUMENTS...``."""
    monkeypatch.delenv("CKPT_TASKS_CONFIG", raising=False)
    monkeypatch.delenv("CKPT_TASKS_STORE_URL", raising=False)

    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Answer(exit_.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def store_path(tmp_path: Path) -> str:
    """Where the store lies."""
    return str(tmp_path / "store")


@pytest.fixture
def stored(store_path: str) -> Stored:
    """A run of two attempts: the second went on from the first checkpoint of the first."""
    with contextlib.closing(open_store(store_path, for_writing=True)) as store:
        run = MadeRun(store, "digits cnn")
        attempt = run.begin("flow-run-1")
        first, zombie = attempt.commit(100), attempt.commit(200)
        later = run.begin("flow-run-2", resume=first, takeover=True)
        newest = later.commit(1_200, epoch=3, data=bytes(3 * 2**20))
        return Stored(run, first, zombie, newest)
