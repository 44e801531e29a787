"""The writer and the trainer die at any time: what was handed over is written all the same."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from support.arenas import no_arena_left
from support.launches import (
    TOY,
    Launch,
    commanded,
    family,
    is_alive,
    is_running,
    launched,
    wait_gone,
    wait_until,
    writer_of,
)
from support.run_checks import check_run, leftovers
from support.toy_runs import STEPS, toy_spec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    EventReader,
    Progress,
    SaveFailed,
    SaveStarted,
)
from ckpt_tasks.store import open_store
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED

Finish = Callable[[TrainSpec], None]


@pytest.fixture
def spec(root: Path) -> TrainSpec:
    """The toy training, named by its file, as a user names theirs."""
    return toy_spec(root, entrypoint=f"{TOY}:train")


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow enough to be caught in its midst."""
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")


@pytest.fixture(autouse=True)
def no_memory_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever dies, no process that came of this test holds an arena afterwards."""
    with no_arena_left(monkeypatch):
        yield


def _checkpoints(spec: TrainSpec) -> list[str]:
    with open_store(spec.config.store) as store:
        return [checkpoint.id for checkpoint in view_run(store, spec.run).checkpoints]


def _hold_writer(attempt: Launch) -> psutil.Process:
    """The attempt's writer, stopped before it has written anything."""
    writer = writer_of(attempt.trainer)
    writer.suspend()
    return writer


def test_trainer_killed_after_the_hand_over(spec: TrainSpec, finish: Finish) -> None:
    """The writer commits what it was given, and the retry starts from it."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        started = attempt.wait_for(SaveStarted)
        attempt.trainer.kill()
        assert _checkpoints(spec) == []
        writer.resume()
        outcome = attempt.outcome()
        assert outcome.code == EXIT_FAILED
        assert outcome.checkpoint == started.checkpoint
        assert [event.checkpoint for event in attempt.of(CheckpointCommitted)] == [
            started.checkpoint
        ]
        wait_gone([writer])
    assert _checkpoints(spec) == [started.checkpoint]
    finish(spec)
    check_run(spec, steps=STEPS)


def test_writer_killed(spec: TrainSpec, finish: Finish) -> None:
    """Training goes on: another writer repeats the save from the same memory."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        started = attempt.wait_for(SaveStarted)
        writer.kill()
        committed = attempt.wait_for(CheckpointCommitted)
        assert committed.checkpoint != started.checkpoint
        assert committed.position.step == 5
        assert attempt.outcome().code == EXIT_DONE
        assert attempt.of(SaveFailed) == []
    check_run(spec, steps=STEPS)


def test_writer_and_trainer_killed(spec: TrainSpec, finish: Finish) -> None:
    """What nobody has written is no checkpoint; the retry starts from what there was."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        attempt.wait_for(SaveStarted)
        attempt.trainer.kill()
        writer.kill()
        outcome = attempt.outcome()
        assert (outcome.code, outcome.checkpoint) == (EXIT_FAILED, None)
    assert _checkpoints(spec) == []
    finish(spec)
    check_run(spec, steps=STEPS)


def test_a_writer_that_comes_too_late_commits_nothing(spec: TrainSpec, finish: Finish) -> None:
    """All others are dead, a later attempt has done everything: the fence holds."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        started = attempt.wait_for(SaveStarted)
        members = [p for p in family(attempt.supervisor) if p.pid != writer.pid]
        for process in members:
            process.kill()
        attempt.outcome()
        finish(spec)
        before = _checkpoints(spec)
        writer.resume()
        wait_gone([writer])
    assert started.checkpoint not in before
    assert _checkpoints(spec) == before
    assert leftovers(spec), "its data lies there, and nobody refers to it"
    check_run(spec, steps=STEPS)


def test_a_writer_outlives_everything_else(spec: TrainSpec, finish: Finish) -> None:
    """Where the whole family is killed, the save that was handed over is committed still."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        started = attempt.wait_for(SaveStarted)
        for process in family(attempt.supervisor):
            if process.pid != writer.pid:
                process.kill()
        attempt.outcome()
        writer.resume()
        wait_gone([writer])
    assert _checkpoints(spec) == [started.checkpoint]
    finish(spec)
    check_run(spec, steps=STEPS)


def test_the_next_attempt_waits_for_the_writer(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same machine: what was handed over is not thrown away by a claim that comes first."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = [
        *("train", spec.entrypoint, "--run", spec.run, "--store", spec.config.store.url),
        *("-p", "epochs=3", "--every-steps", "5", "--every-epochs", "1"),
        *("--invocation", spec.invocation),
    ]
    with commanded(*arguments, log=tmp_path / "log") as command:
        wait_until(lambda: bool(_writers(command.pid)), "a writer")
        (writer,) = _writers(command.pid)
        writer.suspend()
        wait_until(lambda: _has_gone_on(tmp_path, step=7), "two steps behind the hand-over")
        others = [p for p in family(psutil.Process(command.pid)) if p.pid != writer.pid]
        for process in others:
            process.kill()
        wait_gone(others)
    with launched(spec) as retry:
        time.sleep(1.0)
        assert retry.of(AttemptClaimed) == []
        writer.resume()
        resumed = retry.wait_for(AttemptResumed)
        assert resumed.checkpoint == "step-00000005-a1-s1"
        assert retry.outcome().code == EXIT_DONE
    check_run(spec, steps=STEPS)


def _writers(command: int) -> list[psutil.Process]:
    return [p for p in family(psutil.Process(command)) if is_running(p, "writer_process")]


def _has_gone_on(folder: Path, *, step: int) -> bool:
    """Training has come to a step, as the one attempt's log tells."""
    return any(
        isinstance(event, Progress) and event.position.step >= step
        for log in folder.glob("ckpt-tasks-*/trainer.events")
        for event in EventReader(log).read()
    )


def test_idle_writer_killed(spec: TrainSpec) -> None:
    """Nobody notices: the next save starts another one."""
    with launched(spec) as attempt:
        first = attempt.wait_for(CheckpointCommitted)
        writer_of(attempt.trainer).kill()
        later = attempt.wait_for(
            CheckpointCommitted, lambda event: event.checkpoint != first.checkpoint
        )
        assert later.position.step > first.position.step
        assert attempt.outcome().code == EXIT_DONE
    check_run(spec, steps=STEPS)


def test_ended_at_once(spec: TrainSpec, finish: Finish) -> None:
    """A second Ctrl-C leaves nothing that runs, and the next start goes on."""
    with launched(spec) as attempt:
        writer = _hold_writer(attempt)
        attempt.wait_for(SaveStarted)
        attempt.supervisor.send_signal(3)  # SIGQUIT, as the launcher does
        attempt.outcome()
        assert not is_alive(writer)
    finish(spec)
    check_run(spec, steps=STEPS)


def test_saves_can_be_written_by_the_trainer(spec: TrainSpec) -> None:
    """With ``save.asynchronous = false`` there is no other process, and training waits."""
    save = msgspec.structs.replace(spec.config.save, asynchronous=False)
    config = msgspec.structs.replace(spec.config, save=save)
    with launched(msgspec.structs.replace(spec, config=config)) as attempt:
        committed = attempt.wait_for(CheckpointCommitted)
        assert [p for p in attempt.trainer.children() if "writer_process" in str(p.cmdline())] == []
        assert committed.seconds >= committed.drain > 0
        assert attempt.outcome().code == EXIT_DONE
    check_run(spec, steps=STEPS)
