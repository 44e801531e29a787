"""Whichever process of an attempt dies: nothing survives it, and the next launch resumes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from support.launches import TOY, WORKERS, commanded, family, launched, wait_gone, wait_until
from support.run_checks import check_run
from support.toy_runs import STEPS, toy_spec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.events import AttemptClaimed, CheckpointCommitted, Event
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_FAILED, EXIT_STOPPED

Finish = Callable[[TrainSpec], None]


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training, named by its file, as a user names theirs."""
    return toy_spec(root, entrypoint=f"{TOY}:train")


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow enough to be caught in its midst."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")


def _view(spec: TrainSpec) -> RunView:
    with open_store(spec.config.store) as store:
        return view_run(store, spec.run)


def _saved_on_signal(spec: TrainSpec) -> bool:
    newest = _view(spec).newest
    assert newest is not None
    assert newest.record is not None
    return newest.record.trigger == "signal"


def _finish_quickly(finish: Finish, spec: TrainSpec) -> None:
    """The retry, in one of the forks; checks that the run ended as it would have undisturbed."""
    finish(spec)
    check_run(spec, steps=STEPS)


def test_trainer_killed(spec: TrainSpec, finish: Finish) -> None:
    """SIGKILL of the trainer is a retryable failure that names it and the newest checkpoint."""
    with launched(spec) as attempt:
        committed = attempt.wait_for(CheckpointCommitted)
        members = family(attempt.supervisor)
        attempt.trainer.kill()
        outcome = attempt.outcome()
    assert outcome.code == EXIT_FAILED
    assert "SIGKILL" in outcome.message
    assert outcome.checkpoint is not None
    assert outcome.checkpoint >= committed.checkpoint
    wait_gone(members)
    _finish_quickly(finish, spec)


def test_trainer_terminated(spec: TrainSpec, finish: Finish) -> None:
    """SIGTERM of the trainer saves at the next boundary, and asks to be run again."""
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        attempt.trainer.terminate()
        outcome = attempt.outcome()
    assert outcome.code == EXIT_STOPPED, outcome
    assert "SIGTERM" in outcome.message
    assert _saved_on_signal(spec)
    _finish_quickly(finish, spec)


def test_stop_requested(spec: TrainSpec, finish: Finish) -> None:
    """A stop that the caller of `launch` asks for saves at the next boundary."""
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        attempt.request_stop()
        outcome = attempt.outcome()
    assert outcome.code == EXIT_STOPPED, outcome
    assert _saved_on_signal(spec)
    _finish_quickly(finish, spec)


class Cancelled(BaseException):
    """What an orchestrator raises in the thread of a task that it cancels."""


def test_caller_interrupted(spec: TrainSpec, finish: Finish) -> None:
    """An exception in the caller of `launch` passes on, once training has saved and stopped."""
    started: list[psutil.Process] = []

    def on_event(event: Event) -> None:
        if isinstance(event, AttemptClaimed):
            started.extend(family(psutil.Process(event.pid).parent()))
        if isinstance(event, CheckpointCommitted):
            raise Cancelled

    with pytest.raises(Cancelled):
        launch(spec, on_event)
    assert started
    wait_gone(started)
    assert _saved_on_signal(spec)
    _finish_quickly(finish, spec)


def test_supervisor_killed(spec: TrainSpec, finish: Finish) -> None:
    """Without its supervisor the trainer saves at the next boundary and ends; so does all else."""
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        members = family(attempt.supervisor)
        attempt.supervisor.kill()
        outcome = attempt.outcome()
        assert outcome.code == EXIT_FAILED
        assert "supervises the training was killed by SIGKILL" in outcome.message
        assert attempt.of(CheckpointCommitted)[-1].checkpoint in outcome.message
        assert "start the run again" in outcome.message
        wait_gone(members)
    assert _saved_on_signal(spec)
    _finish_quickly(finish, spec)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_command_ended(
    number: signal.Signals, spec: TrainSpec, tmp_path: Path, finish: Finish
) -> None:
    """Whether its command is killed or terminated, training saves, stops, and leaves nothing."""
    log = tmp_path / "log"
    arguments = [
        *("train", spec.entrypoint, "--run", spec.run, "--store", spec.config.store.url),
        *("-p", "epochs=3", "--every-steps", "5", "--every-epochs", "1"),
        *("--invocation", spec.invocation),
    ]
    with commanded(*arguments, log=log) as command:
        wait_until(lambda: command.poll() is not None or _commits(spec) > 0, "a commit")
        assert command.poll() is None, log.read_text()
        members = family(psutil.Process(command.pid))
        command.send_signal(number)
        code = command.wait()
        assert code == (EXIT_STOPPED if number == signal.SIGTERM else -number), log.read_text()
        wait_gone(members)
    assert _saved_on_signal(spec)
    _finish_quickly(finish, spec)


def _commits(spec: TrainSpec) -> int:
    return len(list(Path(spec.config.store.url).glob("*/commits/*.json")))


def test_grace_is_over(
    spec: TrainSpec, finish: Finish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trainer whose step outlasts the grace is killed: a failure, and the retry starts over."""
    trace = tmp_path / "trace"
    monkeypatch.setenv("TOY_STEP_SECONDS", "1000")
    monkeypatch.setenv("TOY_TRACE", str(trace))
    attempt_config = msgspec.structs.replace(spec.config.attempt, grace=0.5)
    config = msgspec.structs.replace(spec.config, attempt=attempt_config)
    with launched(msgspec.structs.replace(spec, config=config)) as attempt:
        members = family(attempt.supervisor)
        wait_until(trace.exists, "the first step")
        attempt.request_stop()
        outcome = attempt.outcome()
    assert outcome.code == EXIT_FAILED
    assert "0.5 s" in outcome.message
    wait_gone(members)
    assert _view(spec).checkpoints == []
    _finish_quickly(finish, spec)


def test_loader_workers_end_with_the_trainer(spec: TrainSpec) -> None:
    """Worker processes of a loader do not survive a trainer that is killed."""
    workers_spec = msgspec.structs.replace(spec, entrypoint=f"{WORKERS}:train")
    with launched(workers_spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        trainer = attempt.trainer
        wait_until(lambda: len(trainer.children()) >= 2, "two workers")
        workers = trainer.children(recursive=True)
        trainer.kill()
        assert attempt.outcome().code == EXIT_FAILED
        wait_gone(workers)
