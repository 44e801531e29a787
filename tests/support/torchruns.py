"""torchrun's agents as real processes, and the trainers below them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from support.launches import PATIENCE, family, is_running, kill_all, wait_until

TESTS = Path(__file__).parents[1]


class Agent:
    """One of torchrun's agents. Use `agent_started`, which leaves no process behind."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=log.parent,
                env={**os.environ, "PYTHONPATH": _python_path(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it and its workers printed."""
        return self._log.read_text("utf-8", "replace")

    @property
    def trainers(self) -> list[psutil.Process]:
        """Those that run below it, by rank; waits for them."""

        def found() -> list[psutil.Process]:
            return [member for member in self.members if is_running(member, "trainer")]

        wait_until(lambda: bool(found()), f"a trainer: {self.said}")
        return sorted(found(), key=lambda trainer: int(trainer.environ()["RANK"]))

    def end(self) -> int:
        """Its exit code; waits for it."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"the agent does not end: {self.said}") from error

    @property
    def members(self) -> list[psutil.Process]:
        """All processes below it, and itself."""
        return family(psutil.Process(self.process.pid))


def _python_path() -> str:
    return os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])


@contextmanager
def agent_started(
    *arguments: str,
    log: Path,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Agent]:
    """``torchrun ARGUMENTS``, ended with all that it has started.

    Parameters
    ----------
    log
        Receives its output; it runs in that file's folder.
    before
        A command that runs it, as ``ip netns exec NAME``.
    """
    command = [*before, sys.executable, "-m", "torch.distributed.run", *arguments]
    agent = Agent(command, log, environment or {})
    try:
        yield agent
    finally:
        if agent.process.poll() is None:
            kill_all(agent.members)
        agent.process.wait()
