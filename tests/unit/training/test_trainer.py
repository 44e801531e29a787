"""The trainer's process around the user's code: what it prints, forks and leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tasks.config import AttemptConfig, CheckpointConfig, StoreConfig
from ckpt_tasks.events import AttemptResumed, Event, OutputLine
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

TRAININGS = """
import multiprocessing
import os
import signal
import threading
import time


def last_words(run):
    print("about to die")
    os.kill(os.getpid(), signal.SIGKILL)


def terminates_a_fork(run):
    run.track(values={})
    for _ in range(100):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        child.start()
        child.terminate()
        child.join()
    print(f"ended with {child.exitcode}")


def leaves_a_thread(run):
    run.track(values={})
    threading.Thread(target=time.sleep, args=(1000,)).start()


def waits(run):
    time.sleep(1000)


def surrogates(run):
    raise ValueError("no file caf" + chr(0xDCE9))


def shouts(run):
    run.track(values={})
    os.write(1, b"x" * 1_000_000 + bytes([10]) + bytes([0xFF, 0xFE, 10]))
"""


class Launched:
    """One attempt of one of these trainings, from its start to its end."""

    def __init__(
        self, tmp_path: Path, training: str, *, stop_on: type[Event] | None = None
    ) -> None:
        (tmp_path / "trainings.py").write_text(TRAININGS)
        self.events: list[Event] = []
        self._stop_on = stop_on
        self.outcome: TrainOutcome = launch(
            TrainSpec(
                entrypoint=f"{tmp_path}/trainings.py:{training}",
                run="toy",
                config=CheckpointConfig(
                    store=StoreConfig(url=str(tmp_path / "store")),
                    attempt=AttemptConfig(grace=0.5),
                ),
                invocation="flow-run-1",
            ),
            self.events.append,
            stop_requested=self._stop_requested,
        )

    def _stop_requested(self) -> bool:
        return self._stop_on is not None and any(isinstance(e, self._stop_on) for e in self.events)

    @property
    def output(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, OutputLine)]


def test_what_is_printed_is_not_lost_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is out when it is printed, so the last one before a SIGKILL is shown."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    launched = Launched(tmp_path, "last_words")
    assert launched.outcome.code == EXIT_FAILED
    assert launched.output == ["about to die"]


def test_a_process_that_the_training_forks_can_be_terminated(tmp_path: Path) -> None:
    """SIGTERM ends it as it ends any process: whoever joins it does not wait for ever."""
    launched = Launched(tmp_path, "terminates_a_fork")
    assert launched.outcome.code == EXIT_DONE, launched.outcome
    assert launched.output == ["ended with -15"]


def test_a_thread_left_running_does_not_hold_the_attempt(tmp_path: Path) -> None:
    """The outcome stands; what is left of the process is ended after the grace."""
    launched = Launched(tmp_path, "leaves_a_thread")
    assert launched.outcome.code == EXIT_DONE, launched.outcome


def test_a_stop_that_outlasts_the_grace_is_no_failure_of_the_training(tmp_path: Path) -> None:
    """The supervisor's own SIGKILL is told, and is nothing that later attempts compare."""
    launched = Launched(tmp_path, "waits", stop_on=AttemptResumed)
    assert launched.outcome.code == EXIT_FAILED
    assert "was killed by SIGKILL" in launched.outcome.message
    assert "had not stopped within 0.5 s" in launched.outcome.message
    assert launched.outcome.ended_with is None


def test_an_error_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    """Its outcome is written, with an escape for what no record can hold."""
    launched = Launched(tmp_path, "surrogates")
    assert launched.outcome.code == EXIT_FAILED
    assert r"ValueError: no file caf\udce9" in launched.outcome.message


def test_output_of_any_kind_comes_through(tmp_path: Path) -> None:
    """A line of a megabyte in pieces, and bytes that are no text as well as they can be shown."""
    launched = Launched(tmp_path, "shouts")
    assert launched.outcome.code == EXIT_DONE, launched.outcome
    assert "".join(launched.output) == "x" * 1_000_000 + "\N{REPLACEMENT CHARACTER}" * 2


def test_a_stop_at_once_claims_nothing(tmp_path: Path) -> None:
    """While its processes are still starting, and may not listen to signals yet: run again."""
    (tmp_path / "trainings.py").write_text(TRAININGS)
    spec = TrainSpec(
        entrypoint=f"{tmp_path}/trainings.py:waits",
        run="toy",
        config=CheckpointConfig(store=StoreConfig(url=str(tmp_path / "store"))),
        invocation="flow-run-1",
    )
    outcome = launch(spec, stop_requested=lambda: True)
    assert outcome.code == EXIT_STOPPED, outcome
    assert outcome.attempt is None
