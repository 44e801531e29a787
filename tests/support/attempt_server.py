"""The server of `attempt_forks`, and the children that it forks.

``python -m support.attempt_server`` reads requests from stdin, and says on stdout how each child
began and ended.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from support.attempt_forks import SHOW_STACKS, Kill, Reply, Request
from support.faulty_attempt import WRITER_FAULTS, FaultyAttempt, WriterFaults, hold

from ckpt_tasks.events import Event, EventLog

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
    function = _function(request)
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


def _function(request: Request) -> Callable[..., Any]:
    """The training's, of what was imported once, wherever the entry point says that it lies."""
    if request.place is None:
        from support import toy_training as training
    else:
        from support import toy_ranks as training  # type: ignore[no-redef]
    function: Callable[..., Any] = getattr(training, request.spec.entrypoint.rpartition(":")[2])
    return function


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
