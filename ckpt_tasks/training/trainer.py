"""The trainer: the process in which the user's code runs.

``python -m ckpt_tasks.training.trainer FOLDER LIVENESS_FD``. It reads its spec from the attempt
folder, reports events and its outcome there, and exits with the outcome's code. When the other
end of the liveness pipe closes, whoever supervised it is gone: it saves at the next boundary and
stops.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from types import FrameType

from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.events import AttemptEnded, EventLog
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.entrypoint import load_entrypoint
from ckpt_tasks.training.spec import AttemptFolder

__all__ = ["main"]


def main(folder: AttemptFolder, liveness: int) -> int:
    """Execute one attempt; returns its exit code."""
    spec = folder.read_spec()
    events = EventLog(folder.trainer_events)
    runner = AttemptRunner(spec, events)
    _stop_on_signals(runner)
    _stop_when_orphaned(runner, liveness)
    try:
        outcome = runner.execute(load_entrypoint(spec.entrypoint))
    except Exception as error:
        if not isinstance(error, CkptTasksError) or os.environ.get("CKPT_TASKS_DEBUG"):
            traceback.print_exception(error)
        outcome = runner.failure(error)
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


def _stop_on_signals(runner: AttemptRunner) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        runner.request_stop(f"received {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _stop_when_orphaned(runner: AttemptRunner, liveness: int) -> None:
    def watch() -> None:
        os.read(liveness, 1)  # returns when the last writer is gone
        runner.request_stop("the process that supervised this one is gone")

    threading.Thread(target=watch, name="liveness", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(AttemptFolder(sys.argv[1]), int(sys.argv[2])))
