"""What the demo prints to be typed works where it was printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ckpt_tasks.demo.commands import command_line, short_path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Executables of an environment whose project is the working directory."""
    executables = tmp_path / ".venv" / "bin"
    executables.mkdir(parents=True)
    for name in ("python", "mlflow"):
        (executables / name).touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(executables / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    return executables


@pytest.mark.usefixtures("environment")
def test_a_program_is_named_with_its_folder() -> None:
    """Who only ran `make` has no environment on the PATH."""
    assert command_line("mlflow", "ui", "a b") == ".venv/bin/mlflow ui 'a b'"


def test_a_program_on_the_path_needs_no_folder(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an activated environment the name alone starts the same program."""
    monkeypatch.setenv("PATH", str(environment))
    assert command_line("mlflow") == "mlflow"


def test_another_program_of_that_name_is_not_meant(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of another environment, first on the PATH, does not take its place."""
    (tmp_path / "mlflow").touch(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), str(environment)]))
    assert command_line("mlflow") == ".venv/bin/mlflow"


def test_a_program_in_the_working_directory_is_not_looked_for(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare name would be looked for on the PATH."""
    monkeypatch.chdir(environment)
    assert command_line("mlflow") == "./mlflow"


def test_the_shorter_of_two_paths_is_printed(tmp_path: Path) -> None:
    """Nobody wants to count dots."""
    assert short_path(Path("/data")) == "/data"
    assert short_path(Path.cwd() / "demo-run" / "store") == "demo-run/store"
