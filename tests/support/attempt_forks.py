"""Attempts of the toy training by the dozen, each in a real process that can be killed.

Importing torch takes seconds, so one server process (`attempt_server`) imports it once and forks a
child per attempt, or per rank of one. A child runs the trainer's own body (`AttemptRunner`),
reports its events to a file, and dies where it was told to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec
from support.faulty_attempt import StoreFault

from ckpt_tasks.events import Event, EventReader
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec

SHOW_STACKS = signal.SIGUSR1
"""Has a child print where each of its threads stands."""


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """A signal for the child: in the midst of a `step`, or `delay` seconds after its `nth` event
    of the named class.
    """

    step: int | None = None
    event: str = ""
    nth: int = 1
    delay: float = 0.0
    signal: Literal["SIGKILL", "SIGSTOP", "SIGTERM"] = "SIGKILL"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What one child is to do.

    Parameters
    ----------
    faults, counted
        As `FaultyAttempt` takes them; nothing is counted where neither is given.
    registers
        The child does a registrar's work, too, in the trainer's thread.
    ages
        What a registrar's work finds has been there for longer than any grace.
    has_writer
        Saves are written by a process beside the child, and the faults are that one's.
    place
        The child is one rank of several, whose attempt's folder is the parent of `folder`.
    """

    folder: str
    spec: TrainSpec
    kill: Kill | None = None
    faults: list[StoreFault] = []
    counted: list[str] | None = None
    environment: dict[str, str] = {}
    hold_at_step: int | None = None
    registers: bool = False
    ages: bool = True
    has_writer: bool = False
    place: RankPlace | None = None

    @property
    def attempt_folder(self) -> AttemptFolder:
        return _attempt_folder(Path(self.folder), self.place)


def _attempt_folder(folder: Path, place: RankPlace | None) -> AttemptFolder:
    return AttemptFolder(folder) if place is None else AttemptFolder(folder.parent, place.rank)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """How a child began or ended; `status` as ``waitpid`` gives it."""

    folder: str
    pid: int
    status: int | None = None


class Fork:
    """One child, as its test sees it."""

    def __init__(
        self, server: AttemptForks, folder: Path, pid: int, place: RankPlace | None = None
    ) -> None:
        self._server = server
        self._folder = _attempt_folder(folder, place)
        self.folder = folder
        self.pid = pid

    def wait(self) -> Fork:
        """Return when it has ended."""
        self.status = self._server.status_of(self)
        return self

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    @property
    def outcome(self) -> TrainOutcome:
        """Its outcome; fails with its output where it left none."""
        outcome = self._folder.read_outcome(self._folder.trainer_outcome)
        assert outcome is not None, self.output
        return outcome

    @property
    def has_outcome(self) -> bool:
        """Whether it lived to leave one."""
        return self._folder.trainer_outcome.exists()

    @property
    def events(self) -> list[Event]:
        return list(EventReader(self._folder.trainer_events).read())

    def events_of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def operations(self) -> list[tuple[str, str]]:
        """Operations counted, as (operation, subject)."""
        return msgspec.json.decode(
            (self.folder / "operations.json").read_bytes(), type=list[tuple[str, str]]
        )

    @property
    def output(self) -> str:
        return self._folder.output.read_text("utf-8")

    @property
    def held(self) -> bool:
        """It waits before the step at which it was told to hold, or stalls."""
        return (self.folder / "held").exists()

    def let_go(self) -> None:
        """Let a held child go on."""
        (self.folder / "go").touch()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class AttemptForks:
    """The server, from the tests' side; children run one by one or side by side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = iter(range(1, sys.maxsize))
        self._ended: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> AttemptForks:
        with (self._folder / "forks.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.attempt_server"],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def start(
        self,
        spec: TrainSpec,
        *,
        kill: Kill | None = None,
        faults: Sequence[StoreFault] = (),
        counted: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
        hold_at_step: int | None = None,
        registers: bool = False,
        ages: bool = True,
        has_writer: bool = False,
        folder: Path | None = None,
        place: RankPlace | None = None,
    ) -> Fork:
        """Fork a child that executes one attempt; returns while it runs.

        Its saves are written by itself, or by a writer, a process of its own that outlives it.
        """
        folder = folder or self.new_folder()
        request = Request(
            folder=str(folder),
            spec=spec,
            kill=kill,
            faults=list(faults),
            counted=None if counted is None else list(counted),
            environment=environment or {},
            hold_at_step=hold_at_step,
            registers=registers,
            ages=ages,
            has_writer=has_writer,
            place=place,
        )
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return Fork(self, folder, self._read(lambda r: r.folder == str(folder)).pid, place)

    def new_folder(self) -> Path:
        """For one attempt."""
        folder = self._folder / f"attempt-{next(self._numbers):04d}"
        folder.mkdir()
        return folder

    def run(self, spec: TrainSpec, **options: object) -> Fork:
        """`start`, and wait for its end."""
        return self.start(spec, **options).wait()  # type: ignore[arg-type]

    def status_of(self, fork: Fork) -> int:
        """Wait for a child's end and return its status."""
        folder = str(fork.folder)
        while folder not in self._ended:
            self._read(lambda reply: reply.folder == folder)
        return self._ended[folder]

    def _read(self, wanted: object) -> Reply:
        assert self._process is not None
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, (self._folder / "forks.log").read_text("utf-8")
            reply = msgspec.json.decode(line, type=Reply)
            if reply.status is not None:
                self._ended[reply.folder] = reply.status
            if wanted(reply):  # type: ignore[operator]
                return reply
