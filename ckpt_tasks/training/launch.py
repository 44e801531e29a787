"""The launcher: one supervised attempt in processes of their own.

The caller is an orchestrator's task or the shell. Training runs elsewhere, so that an OOM kill,
a segfault or a SIGKILL costs the attempt and never the caller. There is no retry here: the
caller owns it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

import ckpt_tasks
from ckpt_tasks.errors import AttemptFailedError, ConfigError
from ckpt_tasks.events import (
    AttemptEnded,
    AttemptResumed,
    CheckpointCommitted,
    Event,
    EventReader,
    EventSink,
    OutputLine,
    Warned,
    discard_event,
)
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.masking import hidden_values, mask_values
from ckpt_tasks.stdio import open_standard_streams
from ckpt_tasks.training.failure import signal_name
from ckpt_tasks.training.leftovers import remove_leftovers, wait_for_writers
from ckpt_tasks.training.spec import FOLDER_PREFIX, AttemptFolder, TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE

__all__ = ["launch"]

_POLL_SECONDS = 0.1
_MAX_LINE_BYTES = 64 * 1024


def _never() -> bool:
    return False


def launch(
    spec: TrainSpec,
    on_event: EventSink = discard_event,
    *,
    stop_requested: Callable[[], bool] = _never,
) -> TrainOutcome:
    """Execute `spec` once, in supervised child processes, and wait for its end.

    Parameters
    ----------
    on_event
        Called in this thread with each event as it comes, and with each line that the user's
        code prints as an `OutputLine`, in which secret hyperparameters are masked.
    stop_requested
        Polled; once true, the trainer saves at its next boundary and stops.

    Returns
    -------
    TrainOutcome
        However it ended; a failure of the training is no exception here.

    Raises
    ------
    ConfigError
        The interpreter asked for cannot be started, or has another version of this package whose
        reports cannot be read.
    AttemptFailedError
        The attempt's files cannot be written.
    BaseException
        Whatever is raised in this thread meanwhile (``KeyboardInterrupt``, an orchestrator's
        cancellation), after the trainer has saved and stopped, or its grace period is over. But
        a ``KeyboardInterrupt`` where a stop was requested already ends the trainer at once, and
        the outcome says where it stands.
    """
    open_standard_streams()  # the children inherit them
    with hidden_values(spec.params), _attempt_folder(spec) as folder:
        supervision = _Supervision(spec, folder, on_event)
        try:
            return supervision.watch(stop_requested)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and stop_requested():
                return supervision.end_at_once()
            supervision.stop()
            raise
        finally:
            supervision.close()


@contextlib.contextmanager
def _attempt_folder(spec: TrainSpec) -> Iterator[AttemptFolder]:
    with contextlib.ExitStack() as stack:
        try:
            remove_leftovers()
            wait_for_writers(spec)
            path = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True)
            )
            folder = AttemptFolder(path)
            folder.write_process("launcher", this_process())
            folder.write_spec(spec)
        except OSError as error:
            raise AttemptFailedError(
                f"the attempt's files cannot be written: {error}; free space there, or set TMPDIR "
                "to another folder"
            ) from error
        yield folder


class _Supervision:
    """The supervisor as the launcher sees it."""

    def __init__(self, spec: TrainSpec, folder: AttemptFolder, on_event: EventSink) -> None:
        self._spec = spec
        self._folder = folder
        self._on_event = on_event
        self._trained = EventReader(folder.trainer_events)
        self._written = EventReader(folder.writer_events)
        self._registered = EventReader(folder.registrar_events)
        self._other_ranks = {
            rank: EventReader(folder.of_rank(rank).trainer_events) for rank in range(1, spec.nproc)
        }
        self._output = _LineReader(folder.output)
        self._stopping = False
        self._checkpoint: str | None = None
        read, self._liveness = os.pipe()
        try:
            self._process = subprocess.Popen(
                _command(spec, folder, read),
                stdin=subprocess.DEVNULL,
                pass_fds=[read],
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._liveness)
            raise ConfigError(f"cannot start {spec.python!r} to train with: {error}") from error
        finally:
            os.close(read)
        with contextlib.suppress(OSError):  # a full disk must not end a training
            folder.write_process("supervisor", this_process(self._process.pid))

    def watch(self, stop_requested: Callable[[], bool]) -> TrainOutcome:
        """Relay everything until the supervisor ends."""
        self._follow(stop_requested)
        return self._outcome() or self._died()

    def _follow(self, stop_requested: Callable[[], bool]) -> None:
        while self._process.poll() is None:
            self._relay()
            if not self._stopping and stop_requested():
                self._process.terminate()
                self._stopping = True
            time.sleep(_POLL_SECONDS)
        self._relay(ended=True)

    def _outcome(self) -> TrainOutcome | None:
        try:
            return self._folder.read_outcome(self._folder.outcome)
        except msgspec.DecodeError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ConfigError:
        theirs = self._folder.read_version() or "another version"
        return ConfigError(
            f"{self._spec.python or sys.executable} trains with ckpt_tasks {theirs}, whose reports "
            f"ckpt_tasks {ckpt_tasks.__version__} here cannot read ({error}); install the same "
            "version in both"
        )

    def _died(self) -> TrainOutcome:
        """The outcome of a supervisor that could not say it itself."""
        code = EXIT_FAILED
        returned = self._process.returncode
        how = (
            f"was killed by {signal_name(-returned)}" if returned < 0 else f"exited with {returned}"
        )
        message = (
            f"the process that supervises the training {how}; newest checkpoint: "
            f"{self._checkpoint or 'none'}; start the run again to go on"
        )
        has_run = self._folder.output.exists()  # the first thing that it makes
        on_request = self._process.returncode in (-signal.SIGTERM, -signal.SIGQUIT)
        if self._stopping and not has_run and on_request:
            code = EXIT_STOPPED
            message = "stopped before it began"
        elif self._process.returncode > 0 and not has_run:
            code = EXIT_USAGE
            message = (
                f"{self._spec.python or sys.executable} cannot run ckpt_tasks (what it said stands "
                "above); pip install 'ckpt-tasks[torch]' there, or name another interpreter"
            )
        return TrainOutcome(code=code, message=message, run=self._spec.run)

    def stop(self) -> None:
        """Have the trainer save and stop, and relay it; the supervisor bounds how long that takes.

        The caller is about to be told why: no failure of its sink replaces that, or ends this.
        """
        self._stopping = True
        self._on_event = _unfailing(self._on_event)
        try:
            if self._process.poll() is None:
                self._process.terminate()
            with contextlib.suppress(ConfigError):  # reports that cannot be read
                self._follow(_never)
            self._process.wait()
        except KeyboardInterrupt:
            self.end_at_once()

    def end_at_once(self) -> TrainOutcome:
        """Have the supervisor kill the trainer; interrupts change nothing any more."""
        self._stopping = True
        while True:
            try:
                self._process.send_signal(signal.SIGQUIT)
                return self.watch(_never)
            except KeyboardInterrupt:
                continue

    def close(self) -> None:
        os.close(self._liveness)
        self._process.wait()

    def _relay(self, *, ended: bool = False) -> None:
        for text in self._output.read(ended=ended):
            self._on_event(OutputLine(text=mask_values(text)))
        for event in self._events():
            if isinstance(event, AttemptResumed | CheckpointCommitted):
                self._checkpoint = event.checkpoint
            self._on_event(event)

    def _events(self) -> Iterator[Event]:
        """What people are to be told."""
        return self._new_events() if self._spec.leads else self._warnings_of_this_rank()

    def _warnings_of_this_rank(self) -> Iterator[Event]:
        place = self._spec.place
        assert place is not None
        for event in self._new_events():
            if isinstance(event, Warned):
                yield Warned(message=f"rank {place.rank}: {event.message}")

    def _new_events(self) -> Iterator[Event]:
        """What is new, causes before effects: each process has a log of its own.

        What has an effect is read after it, so that it is there, too.
        """
        try:
            registered = list(self._registered.read())
            written = list(self._written.read())
            trained = list(self._trained.read())
            ends = [event for event in trained if isinstance(event, AttemptEnded)]
            if ends:  # it waited for commits that may have been told since
                written += self._written.read()
            yield from (event for event in trained if not isinstance(event, AttemptEnded))
            yield from written
            yield from self._warnings_of_other_ranks()
            yield from ends
            yield from registered
        except msgspec.DecodeError as error:
            raise self._unreadable(error) from error

    def _warnings_of_other_ranks(self) -> Iterator[Event]:
        """All else that they tell, rank 0 tells too."""
        for rank, log in self._other_ranks.items():
            for event in log.read():
                if isinstance(event, Warned):
                    yield Warned(message=f"rank {rank}: {event.message}")


def _unfailing(sink: EventSink) -> EventSink:
    def call(event: Event) -> None:
        try:
            sink(event)
        except KeyboardInterrupt:  # a person who wants no more of it
            raise
        except BaseException:  # noqa: S110 - an orchestrator's cancellation is one, too
            pass

    return call


class _LineReader:
    """Follows a text file; a line without its end is kept back until that comes, or the file
    has `ended`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self, *, ended: bool = False) -> Iterator[str]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while line := file.readline(_MAX_LINE_BYTES):
                if not (ended or line.endswith(b"\n") or len(line) >= _MAX_LINE_BYTES):
                    return
                self._offset += len(line)
                # Progress bars rewrite their line; its last state is what a person would see.
                text = line.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
                if text:
                    yield text


def _command(spec: TrainSpec, folder: AttemptFolder, liveness: int) -> list[str]:
    python = spec.python or sys.executable
    return [
        python,
        "-m",
        "ckpt_tasks.training.supervision.supervisor",
        str(folder.path),
        str(liveness),
    ]
