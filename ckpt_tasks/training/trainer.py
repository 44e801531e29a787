"""The trainer: the process in which the user's code runs.

``python -m ckpt_tasks.training.trainer FOLDER LIVENESS_FD [PLACE]``, one for each rank; PLACE says
which, unless the spec does. It reads its spec from the attempt folder, reports events and its
outcome there, and exits with the outcome's code. When the other end of the liveness pipe closes,
whoever supervised it is gone: it saves at the next boundary and stops.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.events import AttemptEnded, EventLog, EventSink
from ckpt_tasks.masking import hidden_values, mask_values
from ckpt_tasks.training.entrypoints.entrypoint import check_params, load_entrypoint, read_signature
from ckpt_tasks.training.hyperparameters import all_hyperparameters
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec

if TYPE_CHECKING:
    from ckpt_tasks.training.attempt import AttemptRunner

__all__ = ["main"]

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(folder: AttemptFolder, liveness: int, place: RankPlace) -> int:
    """Execute one rank of an attempt; returns its exit code."""
    _print_at_once()
    spec = folder.read_spec()
    place = spec.place or place
    events = EventLog(folder.trainer_events)
    stop = _StopRequests()
    stop.watch(liveness)
    outcome = _execute(spec, events, folder, place, stop)
    events(
        AttemptEnded(
            attempt=outcome.attempt,
            code=outcome.code,
            message=outcome.message,
            position=outcome.position,
        )
    )
    folder.write_outcome(outcome, folder.trainer_outcome)
    return outcome.code


def _print_at_once() -> None:
    """Show each line when it is printed, which Python does on a terminal only.

    Into a file it would keep the latest lines back, and lose them where it is killed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _execute(
    spec: TrainSpec,
    events: EventSink,
    folder: AttemptFolder,
    place: RankPlace,
    stop: _StopRequests,
) -> TrainOutcome:
    try:
        function, params = _load(spec)
        # Importing torch takes seconds: not before what can be told without it is known.
        make_runner = _import_runner(place)
    except ConfigError as error:
        _print_traceback(error)
        return TrainOutcome.failure(error, run=spec.run)
    runner = make_runner(msgspec.structs.replace(spec, params=params), events, folder)
    stop.forward_to(runner)
    with contextlib.ExitStack() as while_told:
        try:
            while_told.enter_context(hidden_values(all_hyperparameters(function, params)))
            return runner.execute(function)
        except Exception as error:
            _print_traceback(error)
            return runner.failure(error)


def _import_runner(
    place: RankPlace,
) -> Callable[[TrainSpec, EventSink, AttemptFolder], AttemptRunner]:
    try:
        if place.ranks > 1:
            from ckpt_tasks.training.ranked_attempt import RankedAttempt

            return partial(RankedAttempt, place=place)
        from ckpt_tasks.training.attempt import AttemptRunner
    except ImportError as error:
        raise ConfigError(
            f"{sys.executable} cannot import what training needs ({error}); "
            "pip install 'ckpt-tasks[torch]' there"
        ) from error
    return AttemptRunner


def _load(spec: TrainSpec) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The training function, and its hyperparameters as its annotations want them.

    Raises `ConfigError` for any mistake in them, before anything exists in the store.
    """
    folders = [os.getcwd(), *spec.folders]
    try:
        signature = read_signature(spec.entrypoint, folders=folders)
    except ConfigError:
        # It says what is wrong, unless the function is one whose source cannot be read.
        function = load_entrypoint(spec.entrypoint, folders=folders)
        _check_call(function, spec.entrypoint, spec.params)
        return function, spec.params
    params = check_params(signature, spec.params)
    return load_entrypoint(spec.entrypoint, folders=folders), params


def _check_call(function: Callable[..., Any], entrypoint: str, params: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise ConfigError(
            f"{entrypoint}: its hyperparameters cannot be read ({error}); wrap it: "
            "def train(run, ...): ..."
        ) from error
    try:
        signature.bind(None, **params)
    except TypeError as error:
        given, taken = ", ".join(["the run", *params]), ", ".join(signature.parameters)
        raise ConfigError(
            f"{entrypoint} cannot be called with {given}: {error}; it takes {taken}"
        ) from error


def _print_traceback(error: Exception) -> None:
    """Of the user's own mistakes, their part; of those that have a clear message, none."""
    if os.environ.get("CKPT_TASKS_DEBUG"):
        traceback.print_exception(error)
    elif not isinstance(error, CkptTasksError):
        ours = str(Path(__file__).parent)
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
            trace = trace.tb_next
        told = traceback.format_exception(type(error), error, trace or error.__traceback__)
        sys.stderr.write(mask_values("".join(told)))


class _StopRequests:
    """Signals, and the end of the supervisor, for a runner that may not exist yet."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._runner: AttemptRunner | None = None

    def watch(self, liveness: int) -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, self._handle)
        _spare_forks()

        def wait() -> None:
            os.read(liveness, 1)  # returns when the last writer is gone
            self._request("the process that supervised this one is gone")

        threading.Thread(target=wait, name="liveness", daemon=True).start()

    def forward_to(self, runner: AttemptRunner) -> None:
        """Hand `runner` what was requested before, and all that will be."""
        self._runner = runner
        if self._reason is not None:
            runner.request_stop(self._reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._request(f"received {signal.Signals(number).name}")

    def _request(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._runner is not None:
            self._runner.request_stop(reason)


def _spare_forks() -> None:
    """Have processes that the user's code forks end by a signal: who terminates one waits for it.

    Meanwhile the signals are held back, as Python drops one that comes between the fork and the
    new process' first step.
    """
    held_back = threading.local()

    def hold_back() -> None:
        held_back.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)

    def let_through() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back.mask)

    def let_through_in_child() -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        let_through()

    os.register_at_fork(
        before=hold_back, after_in_parent=let_through, after_in_child=let_through_in_child
    )


if __name__ == "__main__":
    own_place = RankPlace.from_arguments(sys.argv[3:])
    sys.exit(main(AttemptFolder(sys.argv[1], own_place.rank), int(sys.argv[2]), own_place))
