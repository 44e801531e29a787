"""A `launch` beside the test, its events as they come, and the processes it consists of."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from ckpt_tasks.events import AttemptClaimed, Event, OutputLine
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec

TOY = Path(__file__).parent / "toy_training.py"
WORKERS = Path(__file__).parent / "toy_workers.py"
PATIENCE = 180.0

E = TypeVar("E", bound=Event)


def wait_until(holds: Callable[[], bool], what: str, *, timeout: float = PATIENCE) -> None:
    """Wait for a condition; fails with `what` if it never comes."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.02)


class Launch:
    """An attempt launched in a thread. Use `launched`, which leaves no process behind."""

    def __init__(self, spec: TrainSpec) -> None:
        self.events: list[Event] = []
        self._outcome: TrainOutcome | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._launch, args=(spec,), daemon=True)
        self._thread.start()

    def _launch(self, spec: TrainSpec) -> None:
        self._outcome = launch(spec, self.events.append, stop_requested=self._stop.is_set)

    def of(self, kind: type[E]) -> list[E]:
        """Events of one class so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def wait_for(self, kind: type[E], holds: Callable[[E], bool] = lambda event: True) -> E:
        """The first event of a class for which `holds`; waits for it."""

        def found() -> E | None:
            return next((event for event in self.of(kind) if holds(event)), None)

        wait_until(lambda: found() is not None or not self.is_running, f"a {kind.__name__}")
        event = found()
        assert event is not None, f"ended without a {kind.__name__}: {self._outcome}\n{self.output}"
        return event

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def outcome(self) -> TrainOutcome:
        """Waits for the end."""
        self._thread.join(PATIENCE)
        assert self._outcome is not None, f"did not end: {self.events[-5:]}"
        return self._outcome

    @property
    def output(self) -> str:
        """What the processes printed."""
        return "\n".join(event.text for event in self.of(OutputLine))

    def request_stop(self) -> None:
        """As the caller of `launch` asks for a save and an end."""
        self._stop.set()

    @property
    def trainer(self) -> psutil.Process:
        return psutil.Process(self.wait_for(AttemptClaimed).pid)

    @property
    def supervisor(self) -> psutil.Process:
        return self.trainer.parent()

    @property
    def registrar(self) -> psutil.Process:
        return registrar_of(self.supervisor)


def registrar_of(supervisor: psutil.Process) -> psutil.Process:
    """The live registrar among a supervisor's children."""

    def found() -> list[psutil.Process]:
        return [child for child in supervisor.children() if is_running(child, "registrar")]

    wait_until(lambda: bool(found()), "a registrar")
    return found()[0]


def writer_of(trainer: psutil.Process) -> psutil.Process:
    """The live writer among a trainer's children."""

    def found() -> list[psutil.Process]:
        return [child for child in trainer.children() if is_running(child, "writer_process")]

    wait_until(lambda: bool(found()), "a writer")
    return found()[0]


def is_running(process: psutil.Process, module: str) -> bool:
    """Whether it was started as this module."""
    try:
        return any(part.endswith(f".{module}") for part in process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it."""
    return [process, *process.children(recursive=True)]


def wait_gone(processes: Sequence[psutil.Process]) -> None:
    """Wait until none of these processes runs any more."""
    wait_until(lambda: not [p for p in processes if is_alive(p)], f"the end of {processes}")


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, or is stopped; a zombie has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL for each of them, as a machine that goes down does."""
    for process in processes:
        if is_alive(process):
            process.kill()


@contextmanager
def launched(spec: TrainSpec) -> Iterator[Launch]:
    """A `Launch` that is ended, if it has not ended by itself."""
    attempt = Launch(spec)
    try:
        yield attempt
    finally:
        if attempt.is_running:
            for claimed in attempt.of(AttemptClaimed)[:1]:
                _kill_family_of(claimed.pid)
            attempt.request_stop()
            attempt._thread.join(PATIENCE)


def _kill_family_of(trainer: int) -> None:
    try:
        kill_all(family(psutil.Process(trainer).parent()))
    except psutil.NoSuchProcess:
        return


@contextmanager
def commanded(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command line's ``ckpt-tasks`` in a process of its own."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt_tasks", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    members: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            members = family(psutil.Process(process.pid))
        kill_all(members)
        process.wait()
