"""Training on several ranks as a launch makes it: killed, signalled, and on another number."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from support import toy_ranks
from support.arenas import no_arena_left
from support.launches import Launch, is_running, launched, wait_gone, wait_until, writer_of
from support.run_checks import check_run, leftovers
from support.toy_ranks import SAMPLES
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.events import (
    AttemptClaimed,
    CheckpointCommitted,
    Event,
    Progress,
    SaveStarted,
    Warned,
)
from ckpt_tasks.store import open_store
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, CheckpointId


@pytest.fixture(autouse=True)
def no_memory_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever dies, no rank or writer holds an arena afterwards."""
    with no_arena_left(monkeypatch):
        yield


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the training's end is told; its steps are slow enough to be caught in their midst."""
    path = tmp_path / "digest"
    monkeypatch.setenv("TOY_DIGEST", str(path))
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_ranks.__file__).parents[1]))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The ends of the trainings that nothing ever happened to, by kind."""
    ends = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(toy_ranks.__file__).parents[1]))
        for kind in ("ddp", "fsdp"):
            folder = tmp_path_factory.mktemp(kind)
            patch.setenv("TOY_DIGEST", str(folder / "digest"))
            assert launch(_spec(folder / "store", kind)).code == EXIT_DONE
            ends[kind] = (folder / "digest").read_text("ascii")
    return ends


def _spec(root: Path, kind: str = "ddp", **changes: object) -> TrainSpec:
    fields: dict[str, object] = {"entrypoint": f"support.toy_ranks:{kind}", "params": {}}
    return toy_spec(root, **{**fields, "nproc": 2, **changes})


def _view(spec: TrainSpec) -> RunView:
    with open_store(spec.config.store) as store:
        return view_run(store, spec.run)


def _rank(attempt: Launch, rank: int) -> psutil.Process:
    """The trainer of one rank."""

    def found() -> list[psutil.Process]:
        children = attempt.supervisor.children()
        trainers = [child for child in children if is_running(child, "trainer")]
        return [t for t in trainers if t.environ()["RANK"] == str(rank)]

    wait_until(lambda: bool(found()), f"rank {rank}")
    return found()[0]


@pytest.mark.parametrize(
    ("kind", "rank"), [("fsdp", 0), pytest.param("ddp", 1, marks=pytest.mark.exhaustive)]
)
def test_a_rank_is_killed(
    tmp_path: Path, digest: Path, undisturbed: dict[str, str], kind: str, rank: int
) -> None:
    """All end, the outcome names the rank, and the retry ends as if nothing had happened."""
    spec = _spec(tmp_path / "store", kind)
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        members = attempt.supervisor.children(recursive=True)
        _rank(attempt, rank).kill()
        outcome = attempt.outcome()
        wait_gone(members)
    assert outcome.code == EXIT_FAILED
    assert "was killed by SIGKILL" in outcome.message
    assert outcome.message.startswith("rank 1: ") == (rank == 1)
    assert outcome.attempt == 1
    assert outcome.checkpoint is not None
    assert launch(spec).code == EXIT_DONE
    assert digest.read_text("ascii") == undisturbed[kind]
    check_run(spec)


def test_all_ranks_are_killed_after_the_hand_over(
    tmp_path: Path, digest: Path, undisturbed: dict[str, str]
) -> None:
    """Their writers write, rank 0's gathers and commits, and the retry starts from there."""
    spec = _spec(tmp_path / "store")
    with launched(spec) as attempt:
        trainers = [_rank(attempt, rank) for rank in (0, 1)]
        writers = [writer_of(trainer) for trainer in trainers]
        for writer in writers:
            writer.suspend()
        started = attempt.wait_for(SaveStarted)
        _let_steps_pass(attempt)
        for trainer in trainers:
            trainer.kill()
        assert _view(spec).checkpoints == []
        for writer in writers:
            writer.resume()
        outcome = attempt.outcome()
        assert outcome.checkpoint == started.checkpoint
    assert launch(spec).code == EXIT_DONE
    assert digest.read_text("ascii") == undisturbed["ddp"]


def test_rank_0_is_killed_after_the_hand_over(
    tmp_path: Path, digest: Path, undisturbed: dict[str, str]
) -> None:
    """With each rank's part written it is a checkpoint; with one that never will be, it is none.

    Nobody waits for the latter, which a live rank may take half an hour for.
    """
    spec = _spec(tmp_path / "store")
    with launched(spec) as attempt:
        trainers, writers = _kill_rank_0_after_the_hand_over(attempt)
        writers[1].kill()
        writers[0].resume()
        assert attempt.outcome().checkpoint is None
        wait_gone(writers)
    assert _view(spec).checkpoints == []
    assert leftovers(spec) == set()
    with launched(spec) as attempt:
        trainers, writers = _kill_rank_0_after_the_hand_over(attempt)
        writers[1].resume()
        wait_gone(trainers)
        assert _view(spec).checkpoints == []
        writers[0].resume()
        (started,) = attempt.of(SaveStarted)
        outcome = attempt.outcome()
        wait_gone(writers)
    assert (outcome.code, outcome.checkpoint) == (EXIT_FAILED, started.checkpoint)
    assert check_run(spec) == [CheckpointId.parse(started.checkpoint)]
    assert launch(spec).code == EXIT_DONE
    assert digest.read_text("ascii") == undisturbed["ddp"]
    check_run(spec)


def _kill_rank_0_after_the_hand_over(
    attempt: Launch,
) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The trainers, and the writers, which are stopped before they have written anything."""
    trainers = [_rank(attempt, rank) for rank in (0, 1)]
    writers = [writer_of(trainer) for trainer in trainers]
    for writer in writers:
        writer.suspend()
    attempt.wait_for(SaveStarted)
    _let_steps_pass(attempt)
    trainers[0].kill()
    return trainers, writers


def _let_steps_pass(attempt: Launch) -> None:
    """Training goes on behind the boundary at which a save began."""
    steps = {event.position.step for event in attempt.of(Progress)}
    attempt.wait_for(Progress, lambda event: event.position.step > max(steps, default=0))


def test_one_rank_is_asked_to_stop(
    tmp_path: Path, digest: Path, undisturbed: dict[str, str]
) -> None:
    """All save the same step, and stop; the next attempt goes on from it."""
    spec = _spec(tmp_path / "store")
    with launched(spec) as attempt:
        attempt.wait_for(CheckpointCommitted)
        _rank(attempt, 1).terminate()
        outcome = attempt.outcome()
    assert outcome.code == EXIT_STOPPED, outcome
    newest = _view(spec).newest
    assert newest is not None
    assert newest.record is not None
    assert (newest.record.trigger, newest.record.world_size) == ("signal", 2)
    assert launch(spec).code == EXIT_DONE
    assert digest.read_text("ascii") == undisturbed["ddp"]


def test_another_number_of_ranks_goes_on(
    tmp_path: Path, digest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, one, three, and two again; each sample of an epoch is drawn in it by one of them."""
    monkeypatch.setenv("TOY_DRAWN", str(tmp_path / "drawn"))
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.4")  # those that are stopped must not come to the end
    spec = _spec(tmp_path / "store")
    schedule = ScheduleConfig(every_steps=2)
    spec = msgspec.structs.replace(
        spec, config=msgspec.structs.replace(spec.config, schedule=schedule)
    )
    alone = msgspec.structs.replace(spec, nproc=1, entrypoint="support.toy_ranks:alone")
    for other in (spec, alone, msgspec.structs.replace(spec, nproc=3)):
        with launched(other) as attempt:
            attempt.wait_for(CheckpointCommitted)
            attempt.request_stop()
            assert attempt.outcome().code == EXIT_STOPPED
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    outcome = launch(spec)
    assert outcome.code == EXIT_DONE, outcome
    worlds = [c.record.world_size for c in _view(spec).checkpoints[::-1] if c.record is not None]
    assert [world for world, _ in itertools.groupby(worlds)] == [2, 1, 3, 2]
    drawn = Counter((tmp_path / "drawn").read_text("ascii").splitlines())
    assert drawn.keys() == {f"{epoch} {n}" for epoch in range(2) for n in range(SAMPLES)}
    assert drawn.total() - len(drawn) <= 4, "more were drawn twice than ranks need to be even"


def test_a_complete_run_stays_complete(tmp_path: Path, digest: Path) -> None:
    """Every rank learns it, and nothing is trained."""
    spec = _spec(tmp_path / "store")
    assert launch(spec).code == EXIT_DONE
    again = launch(spec)
    assert again.code == EXIT_DONE
    assert "complete already" in again.message


def test_what_other_ranks_warn_of_is_told(
    tmp_path: Path, digest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rank; and how many threads each has, where nobody has said it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    events: list[Event] = []
    assert launch(_spec(tmp_path / "store"), events.append).code == EXIT_DONE
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert [w for w in warnings if w.startswith("rank 1: metrics ['loss'] were logged twice")]
    assert [w for w in warnings if "OMP_NUM_THREADS is not set, and is 1 for each of the 2" in w]
    assert len([event for event in events if isinstance(event, AttemptClaimed)]) == 1
