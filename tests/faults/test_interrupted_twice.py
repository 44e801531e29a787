"""Ctrl-C on a real terminal: the first saves and stops, the second does not wait for that."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from support.launches import TOY, family, kill_all, wait_gone, wait_until

from ckpt_tasks.types import EXIT_FAILED

CTRL_C = b"\x03"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-m", "ckpt_tasks", *arguments]
            os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted
        os.set_blocking(self._screen, False)
        self.shown = ""
        self.code: int | None = None

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def shows(self, text: str) -> bool:
        self._look()
        return text in self.shown

    def has_ended(self) -> bool:
        self._look()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
            self._look()
        return bool(pid)

    def _look(self) -> None:
        with suppress(BlockingIOError, OSError):
            while read := os.read(self._screen, 65536):
                self.shown += read.decode("utf-8", "replace")

    def close(self) -> None:
        if self.code is None:
            kill_all(family(psutil.Process(self.pid)))
            os.waitpid(self.pid, 0)
        os.close(self._screen)


@contextmanager
def on_a_terminal(*arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(list(arguments))
    try:
        yield terminal
    finally:
        terminal.close()


def test_the_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of an endless step: one sentence says where it stands, and nothing is left."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "100000")
    monkeypatch.setenv("TOY_TRACE", str(tmp_path / "trace"))
    arguments = ("train", f"{TOY}:train", "--run", "toy", "--store", str(tmp_path / "store"))
    with on_a_terminal(*arguments) as terminal:
        wait_until(lambda: (tmp_path / "trace").exists() or terminal.has_ended(), "a step")
        assert terminal.code is None, terminal.shown
        members = family(psutil.Process(terminal.pid))
        assert len(members) >= 4, members
        terminal.press(CTRL_C)
        wait_until(lambda: terminal.shows("once more"), "an answer to the first")
        terminal.press(CTRL_C)
        wait_until(terminal.has_ended, "the end")
    assert terminal.code == EXIT_FAILED, terminal.shown
    last = terminal.shown.splitlines()[-1]
    assert "failed: ended at once, without another save (the trainer was killed" in last
    assert "newest checkpoint: none); run it again to go on" in last
    wait_gone(members)
