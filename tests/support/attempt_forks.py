"""Attempts of the toy training by the dozen, each in a real process that can be killed.

Importing torch takes seconds, so one server process imports it once and forks a child per
attempt. A child runs the trainer's own body (`AttemptRunner`), reports its events to a file, and
dies where it was told to.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec
from support.faulty_attempt import (
    WRITER_FAULTS,
    FaultyAttempt,
    StoreFault,
    WriterFaults,
    hold,
)

from ckpt_tasks.events import Event, EventLog, EventReader
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
                [sys.executable, "-m", "support.attempt_forks"],
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


# -- the server's side -----------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # of its main thread, which forks all


def serve() -> None:
    """Fork a child for each request read from stdin, until that ends."""
    import support.toy_training  # noqa: F401 - imported once, for all children
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports most of torch, lazily
    lock = threading.Lock()
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        _import_for(request)
        with lock:
            pid = os.fork()
            if pid == 0:
                _in_child(request)
            _say(Reply(folder=request.folder, pid=pid))
        threading.Thread(target=_reap, args=(request.folder, pid, lock), daemon=True).start()


def _import_for(request: Request) -> None:
    """Once, instead of in every child."""
    import ckpt_tasks.training.attempt

    if request.place is not None:
        import support.rank_child  # noqa: F401
    config = request.spec.config
    if config.store.url.startswith("s3:"):
        _learn_s3()
    if request.registers and config.registry.kind == "mlflow":
        import ckpt_tasks.integrations.mlflow  # noqa: F401


@functools.cache
def _learn_s3() -> None:
    """What its requests look like takes longer to read than an attempt to send them."""
    import botocore.session

    import ckpt_tasks.store.s3  # noqa: F401 - once, instead of in every child
    from ckpt_tasks.store.s3_client import share_loader

    session = botocore.session.Session()
    share_loader(session)
    session.create_client("s3", region_name="us-east-1")


def _reap(folder: str, pid: int, lock: threading.Lock) -> None:
    status = os.waitpid(pid, 0)[1]
    with lock:  # not in the midst of a fork
        _say(Reply(folder=folder, pid=pid, status=status))


def _say(reply: Reply) -> None:
    os.write(1, msgspec.json.encode(reply) + b"\n")


def _in_child(request: Request) -> None:
    code = 70
    try:
        # One that has nothing to wait for but its test, or a rank that repeats its last save in a
        # store that is gone, would outlive both.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        code = _attempt(request)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _attempt(request: Request) -> int:
    from support import toy_training

    from ckpt_tasks.training import attempt

    folder = request.attempt_folder
    output = os.open(folder.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(SHOW_STACKS, file=2)
    os.environ.update(request.environment)
    log = EventLog(folder.trainer_events)
    strike = _striker(request.kill)
    faulty = _faulty(request)
    if request.faults or request.counted is not None or request.registers:
        attempt.open_store = faulty.open_store
    registrar = faulty.registrar(request.spec, log)
    if request.hold_at_step is not None:
        _in_step(toy_training, request.hold_at_step, lambda: hold(Path(request.folder)))
    kill = request.kill
    if kill is not None and kill.step is not None:
        _in_step(toy_training, kill.step, lambda: _strike(kill))

    def on_event(event: Event) -> None:
        log(event)
        strike(event)
        if registrar is not None:
            registrar(event)

    if request.place is not None:
        from support.rank_child import make_runner

        runner = make_runner(request.spec, on_event, folder, request.place)
    else:
        beside = folder if request.has_writer else None
        runner = attempt.AttemptRunner(request.spec, on_event, beside)
    signal.signal(signal.SIGTERM, lambda *_: runner.request_stop("received SIGTERM"))
    module, _, name = request.spec.entrypoint.rpartition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        outcome = runner.execute(function)
    except Exception as error:
        traceback.print_exc()
        outcome = runner.failure(error)
    if registrar is not None:
        registrar.finish(outcome.code)
    if not request.has_writer:
        faulty.tell()
    folder.write_outcome(outcome, folder.trainer_outcome)
    return outcome.code


def _faulty(request: Request) -> FaultyAttempt:
    """What the child opens, or, without faults, only counts."""
    path, registers, ages = Path(request.folder), request.registers, request.ages
    failures = None if request.place is None else request.attempt_folder.failures
    if not request.has_writer:
        return FaultyAttempt(
            path,
            request.faults,
            request.counted,
            registers=registers,
            ages=ages,
            failures=failures,
        )
    told = WriterFaults(
        folder=request.folder,
        faults=request.faults,
        counted=request.counted or [],
        failures=None if failures is None else str(failures),
    )
    os.environ[WRITER_FAULTS] = msgspec.json.encode(told).decode()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [
            str(Path(__file__).parent / "faulty_writer"),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
    )
    return FaultyAttempt(path, [], [], registers=registers, ages=ages)


def _striker(kill: Kill | None) -> object:
    seen = 0

    def strike(event: Event) -> None:
        nonlocal seen
        if kill is None or type(event).__name__ != kill.event:
            return
        seen += 1
        if seen == kill.nth:
            threading.Thread(target=_strike, args=(kill,), daemon=True).start()

    return strike


def _strike(kill: Kill) -> None:
    time.sleep(kill.delay)
    os.kill(os.getpid(), signal.Signals[kill.signal])


def _in_step(toy_training: object, wanted: int, act: Callable[[], None]) -> None:
    """Act in the step that follows the first `wanted` ones, before its end."""
    trace = toy_training._trace  # type: ignore[attr-defined]

    def trace_and_act(step: int) -> None:
        trace(step)
        if step == wanted:
            act()

    toy_training._trace = trace_and_act  # type: ignore[attr-defined]


if __name__ == "__main__":
    serve()
