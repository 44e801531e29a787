"""The folder of an attempt: what cannot be written or read is told, and none is left for ever."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

import ckpt_tasks
from ckpt_tasks.errors import AttemptFailedError, ConfigError
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.format.records import Process
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.leftovers import remove_leftovers
from ckpt_tasks.training.spec import FOLDER_PREFIX, AttemptFolder, TrainSpec

SPEC = TrainSpec(entrypoint="toy:train", run="toy", invocation="one")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where attempts have their folders in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def dead() -> Process:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = this_process(child.pid)
    child.communicate()
    return process


def left(folder: Path, name: str, **processes: Process) -> Path:
    """A folder that an attempt has left."""
    path = folder / f"{FOLDER_PREFIX}{name}"
    path.mkdir()
    for role, process in processes.items():
        AttemptFolder(path).write_process(role, process)
    return path


def test_folders_of_dead_attempts_are_removed(temporary: Path, dead: Process) -> None:
    """All their processes have ended."""
    path = left(temporary, "dead", launcher=dead, supervisor=dead, trainer=dead)
    (path / "spec.json").write_text("{}")
    remove_leftovers()
    assert not path.exists()


def test_folders_that_may_be_in_use_stay(temporary: Path, dead: Process) -> None:
    """One process lives; or lived where nobody can look; or nothing says whose it is."""
    elsewhere = msgspec.structs.replace(dead, host="elsewhere")
    rebooted = msgspec.structs.replace(dead, boot_id="another")
    kept = [
        left(temporary, "mine", launcher=this_process()),
        left(temporary, "supervised", launcher=dead, supervisor=this_process()),
        left(temporary, "training", launcher=dead, supervisor=dead, trainer=this_process()),
        left(temporary, "elsewhere", launcher=elsewhere),
        left(temporary, "rebooted", launcher=rebooted),
        left(temporary, "unknown"),
        left(temporary, "unreadable", launcher=dead),
    ]
    (kept[-1] / "supervisor.process").write_text("{")
    remove_leftovers()
    assert [path for path in kept if not path.exists()] == []


def test_a_link_is_not_followed(temporary: Path, dead: Process) -> None:
    """What it points to is nobody's attempt folder."""
    target = temporary / "other"
    left(temporary, "dead", launcher=dead).rename(target)
    (temporary / f"{FOLDER_PREFIX}link").symlink_to(target)
    remove_leftovers()
    assert target.exists()


def test_a_folder_that_cannot_be_written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that says where, and what to do; a retry may find room."""
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(AttemptFailedError, match=r"gone/ckpt-tasks-.*TMPDIR"):
        launch(SPEC)


def test_reports_of_another_version(temporary: Path) -> None:
    """One error that names both versions, instead of a record that nobody can decode."""
    python = temporary / "python"
    python.write_text(
        "#!/bin/sh\n"
        """printf '{"event":"FromTheFuture"}\\n' > "$3/trainer.events"\n"""
        """printf 99.1 > "$3/version"\n"""
    )
    python.chmod(0o755)
    with pytest.raises(ConfigError, match="FromTheFuture") as error:
        launch(msgspec.structs.replace(SPEC, python=str(python)))
    assert f"{python} trains with ckpt_tasks 99.1" in str(error.value)
    assert f"ckpt_tasks {ckpt_tasks.__version__} here" in str(error.value)
    assert list(temporary.glob(f"{FOLDER_PREFIX}*")) == []
