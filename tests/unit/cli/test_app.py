"""How the command line starts, fails and is extended."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest

from ckpt_tasks import __version__
from ckpt_tasks.cli import app


def test_version_and_help(call):
    """The version is the package's; help lists the commands, plugins among them."""
    assert call("--version").out == f"ckpt-tasks, version {__version__}\n"
    answer = call("--help")
    assert answer.code == 0
    for name in ("bench", "demo", "ls", "prefect", "runs", "show", "train", "verify"):
        assert f"\n  {name} " in answer.out
    assert "..." not in answer.out.partition("Commands:")[2]  # no summary is cut off


def test_the_default_store_stands_in_the_help(call):
    """Where nothing names a store, one in the working directory is taken."""
    assert "else ./checkpoints" in " ".join(call("runs", "--help").out.split())


def test_no_command_is_a_usage_error(call):
    """Called with nothing, it shows the help and exits with 2."""
    answer = call()
    assert answer.code == 2
    assert "Usage: ckpt-tasks" in answer.out + answer.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lss"], "did you mean 'ls'?"),
        (["ls"], "Missing argument 'RUN'"),
        (["ls", "x", "--stores", "y"], "--store"),
        (["runs", "--config", "none.toml"], "none.toml"),
    ],
)
def test_usage_errors_are_one_line(call, arguments, expected):
    """A wrong command, argument, option or file exits with 2 and says what is right."""
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert expected in answer.err
    assert answer.err.count("\n") == 1


@click.command()
@click.argument("kind")
def _raising(kind: str) -> None:
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise RuntimeError("two\nlines from s3://user:hunter2@bucket")


@pytest.fixture
def plugins(monkeypatch):
    """Two commands of an installed package: one that raises, one whose import fails."""
    found = {
        "raising": EntryPoint("raising", f"{__name__}:_raising", "ckpt_tasks.cli"),
        "absent": EntryPoint("absent", "no_such_module:command", "ckpt_tasks.cli"),
    }
    monkeypatch.setattr(app, "_plugins", lambda: found)


def test_unexpected_errors_are_one_masked_line_with_a_hint(call, plugins):
    """An error that nobody foresaw shows no traceback, no credentials, and how to see more."""
    answer = call("raising", "error")
    assert answer.code == 1
    assert answer.err.count("\n") == 1
    assert "RuntimeError: two lines from s3://***@bucket" in answer.err
    assert "--debug" in answer.err


def test_debug_shows_the_traceback(plugins):
    """With --debug before the command, the error itself comes through."""
    with pytest.raises(RuntimeError, match="two"):
        app.main(["--debug", "raising", "error"])


def test_an_interrupt_ends_quietly(call, plugins):
    """Ctrl-C exits with 130 and one line."""
    answer = call("raising", "interrupt")
    assert (answer.code, answer.err.strip()) == (130, "error: interrupted")


def test_a_plugin_that_cannot_be_imported_names_its_extra(call, plugins):
    """A command whose package is missing says what to install, and does not break the help."""
    answer = call("absent")
    assert answer.code == 2
    assert "no_such_module" in answer.err
    assert "ckpt-tasks[absent]" in answer.err
    assert "absent" in call("--help").out


def test_a_closed_pipe_is_no_error_message(store_path, stored):
    """A reader that stops early, like head, leaves no traceback and no complaint."""
    command = [sys.executable, "-m", "ckpt_tasks", "runs", "--store", store_path, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1
