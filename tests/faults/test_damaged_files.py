"""Damage in every kind of file is found, passed over, quarantined and reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from support.attempt_forks import AttemptForks, Fork, Kill
from support.claims import move_claim_elsewhere
from support.damage import DAMAGES
from support.launches import TOY, launched
from support.published import check_published, with_registry
from support.run_checks import trained_steps
from support.toy_runs import STEPS, Digest, toy_spec

from ckpt_tasks.checkpointer.catalog import CheckpointView, view_run
from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.events import (
    AttemptResumed,
    CheckpointQuarantined,
    RegistryLinked,
    Warned,
)
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE, CheckpointId

LAYOUT = RunLayout("toy")

Damage = Callable[[Path], None]
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


@pytest.fixture(scope="module")
def died_twice(
    forks: AttemptForks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[CheckpointId]]:
    """A store whose run was killed in steps 13 and 22, and its valid checkpoints, oldest first."""
    folder = tmp_path_factory.mktemp("died-twice") / "store"
    spec = toy_spec(folder)
    for step in (12, 21):
        assert forks.run(spec, kill=Kill(step=step)).killed
    with open_store(str(folder)) as store:
        views = view_run(store, "toy").checkpoints
    valid = [CheckpointId.parse(view.id) for view in views if view.standing == "valid"][::-1]
    assert [c.attempt for c in valid[:3]] == [1, 1, 1]
    assert [c.attempt for c in valid[-2:]] == [2, 2]
    return folder, valid


@pytest.fixture
def copy(died_twice: tuple[Path, list[CheckpointId]], root: Path) -> TrainSpec:
    """That run in a store of this test's own."""
    shutil.copytree(died_twice[0], root)
    return toy_spec(root)


@pytest.fixture
def newest(died_twice: tuple[Path, list[CheckpointId]]) -> CheckpointId:
    """The checkpoint that a retry starts from when nothing is damaged."""
    return died_twice[1][-1]


@pytest.fixture
def older(died_twice: tuple[Path, list[CheckpointId]]) -> CheckpointId:
    """The one before."""
    return died_twice[1][-2]


@pytest.fixture
def retry(
    forks: AttemptForks, digest: Digest, expected_digest: str
) -> Iterator[Callable[[TrainSpec], Fork]]:
    """Run the next attempt to its end, which must be what it is without any damage."""

    def run(spec: TrainSpec) -> Fork:
        fork = forks.run(spec, environment=digest.environment)
        assert fork.outcome.code == EXIT_DONE, fork.output
        assert digest.read() == expected_digest
        assert trained_steps(spec) == list(range(1, STEPS + 1))
        return fork

    return run


def _start(fork: Fork) -> AttemptResumed:
    (event,) = fork.events_of(AttemptResumed)
    assert isinstance(event, AttemptResumed)
    return event


def _view(spec: TrainSpec, checkpoint: CheckpointId) -> CheckpointView:
    with open_store(spec.config.store) as store:
        views = {view.id: view for view in view_run(store, spec.run).checkpoints}
    return views[str(checkpoint)]


def _data_file(root: Path, checkpoint: CheckpointId, name: str) -> Path:
    folder = f"a{checkpoint.attempt:04d}-s{checkpoint.sequence:04d}-*"
    (path,) = root.glob(f"toy/data/{folder}/{name}")
    return path


@every_damage
@pytest.mark.parametrize(
    "name",
    [
        "model.rank0000.safetensors",
        "optimizer.rank0000.safetensors",
        "ckpt_tasks.rng.rank0000.safetensors",
        "rank0000.index.json",
    ],
)
def test_falls_back_from_damaged_data(
    name: str,
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    older: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """A damaged tensor file or index costs that checkpoint: quarantined, reported, next older."""
    damage(_data_file(root, newest, name))
    fork = retry(copy)
    (event,) = fork.events_of(CheckpointQuarantined)
    assert isinstance(event, CheckpointQuarantined)
    assert event.checkpoint == str(newest)
    assert name in event.why
    assert _start(fork).checkpoint == str(older)
    with open_store(copy.config.store) as store:
        resumed = read_attempts(store, LAYOUT)[-1].resumed
    assert resumed is not None
    assert [passed.checkpoint for passed in resumed.passed_over] == [str(newest)]
    assert _view(copy, newest).standing == "quarantined"


@every_damage
def test_falls_back_from_a_damaged_commit_record(
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    older: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """A damaged commit record costs that checkpoint, and nothing else."""
    damage(root / LAYOUT.commit(newest))
    fork = retry(copy)
    assert [e.checkpoint for e in fork.events_of(CheckpointQuarantined)] == [str(newest)]
    assert _start(fork).checkpoint == str(older)
    assert _view(copy, newest).standing == "damaged"


@pytest.mark.parametrize("name", ["model.rank0000.safetensors", "rank0000.index.json"])
def test_falls_back_from_missing_data(
    name: str,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    older: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """A committed checkpoint whose file is gone is quarantined, and the next older one used."""
    _data_file(root, newest, name).unlink()
    fork = retry(copy)
    (event,) = fork.events_of(CheckpointQuarantined)
    assert isinstance(event, CheckpointQuarantined)
    assert "missing" in event.why
    assert _start(fork).checkpoint == str(older)


def test_falls_back_as_far_as_it_must(
    copy: TrainSpec,
    root: Path,
    died_twice: tuple[Path, list[CheckpointId]],
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """Past three damaged ones, and past the attempt that made them, the fourth is used."""
    valid = died_twice[1]
    for checkpoint in valid[-3:]:
        DAMAGES["middle-bit"](_data_file(root, checkpoint, "model.rank0000.safetensors"))
    fork = retry(copy)
    quarantined = [event.checkpoint for event in fork.events_of(CheckpointQuarantined)]
    assert quarantined == [str(checkpoint) for checkpoint in valid[:-4:-1]]
    assert _start(fork).checkpoint == str(valid[-4])


@every_damage
@pytest.mark.parametrize("attempt", [1, 2])
def test_a_damaged_claim_costs_nothing(
    attempt: int,
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """An unreadable claim still fences and still counts; the damage is reported."""
    path = LAYOUT.attempt(attempt)
    damage(root / path)
    fork = retry(_patient(copy))
    assert any(isinstance(e, Warned) and path in e.message for e in fork.events), fork.output
    assert _start(fork).checkpoint == str(newest)
    assert _start(fork).attempt == 3


def _patient(spec: TrainSpec) -> TrainSpec:
    """With the shortest wait for a sign of life of an owner that cannot be identified."""
    attempt = msgspec.structs.replace(spec.config.attempt, heartbeat=0.1, takeover_after=0.5)
    config = msgspec.structs.replace(spec.config, attempt=attempt)
    return msgspec.structs.replace(spec, config=config)


@every_damage
@pytest.mark.parametrize("attempt", [1, 2])
def test_a_damaged_resumed_record_costs_nothing(
    attempt: int,
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """What an attempt resumed from stands in its commits too, and is read from there."""
    path = LAYOUT.resumed(attempt)
    damage(root / path)
    fork = retry(copy)
    assert any(isinstance(e, Warned) and path in e.message for e in fork.events)
    assert _start(fork).checkpoint == str(newest)


@every_damage
def test_a_damaged_heartbeat_protects_nobody(
    damage: Damage, copy: TrainSpec, root: Path, retry: Callable[[TrainSpec], Fork]
) -> None:
    """Another host takes over from a dead attempt whose heartbeat cannot be read."""
    move_claim_elsewhere(root, "toy", 2)
    heartbeat = root / LAYOUT.heartbeat(2)
    heartbeat.write_bytes(b'{"attempt": 2, "beat": 1}')
    damage(heartbeat)
    fork = retry(_with_invocation(_patient(copy), "flow-run-2"))
    assert _start(fork).attempt == 3


def _with_invocation(spec: TrainSpec, invocation: str) -> TrainSpec:
    return msgspec.structs.replace(spec, invocation=invocation)


@every_damage
def test_a_damaged_run_record_stops_before_anything_changes(
    damage: Damage, copy: TrainSpec, root: Path, forks: AttemptForks
) -> None:
    """A run that cannot be identified is a configuration error that says so; nothing is lost."""
    damage(root / LAYOUT.run_record)
    before = _contents(root)
    outcome = forks.run(copy).outcome
    assert outcome.code == EXIT_USAGE
    assert "run.json" in outcome.message
    assert "untouched" in outcome.message
    assert "\n" not in outcome.message
    assert _contents(root) == before


def _contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@every_damage
def test_a_damaged_completion_marker_only_costs_a_look(
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """The run counts as not complete, goes on from its last checkpoint, and is complete again."""
    retry(copy)
    damage(root / LAYOUT.completed)
    fork = retry(copy)
    assert any(isinstance(e, Warned) and LAYOUT.completed in e.message for e in fork.events)
    assert _start(fork).position.step == STEPS
    with open_store(copy.config.store) as store:
        assert view_run(store, "toy").completed is not None


@every_damage
def test_a_damaged_quarantine_mark_still_counts(
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    older: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """A mark's existence is what counts: nobody starts from the checkpoint it stands on."""
    quarantine = root / LAYOUT.mark("quarantined", newest)
    quarantine.parent.mkdir(parents=True)
    quarantine.write_bytes(b"{}")
    damage(quarantine)
    fork = retry(copy)
    assert _start(fork).checkpoint == str(older)
    assert _view(copy, newest).standing == "quarantined"


@every_damage
def test_a_damaged_pin_still_holds(
    damage: Damage,
    copy: TrainSpec,
    root: Path,
    newest: CheckpointId,
    retry: Callable[[TrainSpec], Fork],
) -> None:
    """The run goes on from the pinned checkpoint as without damage; the pin stays where it is,
    counts, and whoever looks at it is told that its reason is lost.
    """
    with open_store(copy.config.store) as store:
        mark(store, LAYOUT, "pins", newest, why="for the paper", by="ada")
    assert _view(copy, newest).pin == "for the paper (ada)"
    pin = root / LAYOUT.mark("pins", newest)
    damage(pin)
    spoilt = pin.read_bytes()
    fork = retry(copy)
    assert _start(fork).checkpoint == str(newest)
    assert pin.read_bytes() == spoilt
    view = _view(copy, newest)
    assert (view.standing, view.pinned) == ("valid", True)
    assert view.pin == f"{LAYOUT.mark('pins', newest)} is damaged: who pinned it, and why, is lost"


@pytest.mark.parametrize("name", ["middle-bit", "empty"])
def test_damaged_registry_ids_are_searched(
    name: str, root: Path, mlflow_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ``mlflow.json`` damaged between two attempts is told and made again from what MLflow
    itself knows: the one run of the training holds every step and every checkpoint once.
    """
    ids = root / LAYOUT.registry_ids("mlflow")
    monkeypatch.setenv("TOY_STEP_SECONDS", "1")  # still training when MLflow is linked
    spec = with_registry(toy_spec(root, entrypoint=f"{TOY}:train"), mlflow_database)
    with launched(spec) as attempt:
        attempt.wait_for(RegistryLinked)
        attempt.request_stop()
        assert attempt.outcome().code == EXIT_STOPPED, attempt.output
    before = ids.read_bytes()
    DAMAGES[name](ids)
    monkeypatch.setenv("TOY_STEP_SECONDS", "0")
    with launched(spec) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
    told = [event.message for event in attempt.of(Warned)]
    assert any(LAYOUT.registry_ids("mlflow") in message for message in told), told
    assert ids.read_bytes() == before
    check_published(spec, mlflow_database)


def test_nothing_restorable_is_an_outcome_of_its_own(
    copy: TrainSpec,
    root: Path,
    died_twice: tuple[Path, list[CheckpointId]],
    forks: AttemptForks,
) -> None:
    """With every checkpoint damaged the run ends with 4, and never starts again at step 0."""
    for path in root.glob("toy/data/*/model.rank0000.safetensors"):
        DAMAGES["middle-bit"](path)
    outcome = forks.run(copy).outcome
    assert outcome.code == 4
    assert "--resume fresh" in outcome.message
    with open_store(copy.config.store) as store:
        view = view_run(store, "toy")
    assert view.attempts[-1].resumed is None
    valid = {str(checkpoint) for checkpoint in died_twice[1]}
    assert {v.standing for v in view.checkpoints if v.id in valid} == {"quarantined"}
