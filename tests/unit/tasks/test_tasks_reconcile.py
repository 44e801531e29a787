"""Store and registry agree afterwards, whatever they disagreed about; and a repetition is idle."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest
from support.made_runs import MadeAttempt, MadeRun, elsewhere, small_state, write_state

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    StoreConfig,
)
from ckpt_tasks.errors import CheckpointNotFoundError
from ckpt_tasks.fencing.heartbeat import Heart
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import ReconcileReport, reconcile, reconcile_all
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.testing.memory_registry import MemoryRun
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> RegistryMemory:
    """The registry's memory, which a configuration that names a registry opens."""
    memory = RegistryMemory()
    module = importlib.import_module("ckpt_tasks.tasks.reconcile")
    monkeypatch.setattr(module, "load_registry", lambda config: MemoryRegistry(memory))
    return memory


@pytest.fixture
def config(tmp_path: Path) -> CheckpointConfig:
    """A store, a registry, and an attempt that counts as dead soon."""
    return CheckpointConfig(
        store=StoreConfig(url=str(tmp_path / "store")),
        registry=RegistryConfig(tracking_uri="memory://", best="loss:min"),
        attempt=AttemptConfig(heartbeat=0.1, takeover_after=0.5),
        retention=RetentionConfig(grace=3600.0),
    )


@pytest.fixture
def run(config: CheckpointConfig) -> MadeRun:
    """A run of that store."""
    return MadeRun(open_store(config.store, for_writing=True))


def rows(*steps: int) -> list[tuple[str, float, int, int]]:
    return [("loss", 1.0 / step, step, 1000 + step) for step in steps]


def trained(run: MadeRun, *steps: int, **claim: object) -> tuple[MadeAttempt, list[str]]:
    """An attempt that has ended, with a checkpoint at each step."""
    attempt = run.begin(**claim)  # type: ignore[arg-type]
    saved = [
        str(attempt.save(step, metrics={"loss": 1.0 / step}, rows=rows(step))) for step in steps
    ]
    run.fail(attempt.number, step=steps[-1])
    return attempt, saved


def kinds(report: ReconcileReport) -> list[str]:
    assert report.problem is None
    return [difference.kind for difference in report.changes]


def stored_run(memory: RegistryMemory) -> MemoryRun:
    (run,) = memory.runs.values()
    return run


def versions(memory: RegistryMemory) -> list[str]:
    return [version.checkpoint for version in memory.versions]


def aliases(memory: RegistryMemory) -> dict[str, str]:
    """What each alias points at."""
    checkpoints = {version.version: version.checkpoint for version in memory.versions}
    return {alias: checkpoints[version] for alias, version in memory.aliases.items()}


def check_agreed(config: CheckpointConfig, run: MadeRun, memory: RegistryMemory) -> None:
    """Nothing is left to do, and nothing at all changes."""
    before = run.contents(), repr(vars(memory))
    report = reconcile(config, run.name)
    assert (report.changes, report.left, report.problem) == ([], [], None)
    assert "nothing to change" in str(report)
    assert (run.contents(), repr(vars(memory))) == before


def test_a_run_that_never_was_in_the_registry(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """Params of every attempt, rows, checkpoints, aliases, story and status, as if the registry
    had been there; a dry run tells the same and changes nothing.
    """
    _, first = trained(run, 1, 2)
    _, second = trained(run, 3)
    before = run.contents()
    plan = reconcile(config, run.name, dry_run=True)
    assert kinds(plan) == ["run", "register", "register", "register", "metrics"]
    assert (run.contents(), memory.runs) == (before, {})

    report = reconcile(config, run.name)
    assert report.changes == plan.changes
    assert versions(memory) == [*first, *second]
    assert aliases(memory) == {"resume-digits": second[0], "best": second[0]}
    stored = stored_run(memory)
    assert sorted(row.step for row in stored.rows) == [1, 2, 3]
    assert (stored.status, "Training run `digits`" in stored.note) == ("failed", True)
    check_agreed(config, run, memory)


def test_each_difference_goes(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """What is gone is forgotten with its aliases, which move back to what is left; what is missing
    is registered; the run's twin goes; a run that is complete counts as finished.
    """
    _, saved = trained(run, 1, 2, 3)
    reconcile(config, run.name)
    gone, kept = saved[2], saved[:2]
    run.store.delete(run.layout.commit(CheckpointId.parse(gone)))
    memory.versions = [v for v in memory.versions if v.checkpoint != kept[1]]
    memory.new_run(stored_run(memory).description)
    run.complete(kept[1])
    report = reconcile(config, run.name)
    assert kinds(report) == ["twin", "gone", "register", "alias", "status"]
    assert sorted(versions(memory)) == kept
    assert aliases(memory) == {"resume-digits": kept[1], "best": kept[1]}
    states = [(one.status, one.deleted) for one in memory.runs.values()]
    assert states == [("finished", False), ("running", True)]
    check_agreed(config, run, memory)


def test_a_run_that_the_registry_has_lost(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """A deleted run is restored; of one that is gone another is made, and nothing of it is left."""
    _, saved = trained(run, 1, 2)
    reconcile(config, run.name)
    stored_run(memory).deleted = True
    run.store.delete(run.layout.commit(CheckpointId.parse(saved[0])))
    assert kinds(reconcile(config, run.name, dry_run=True)) == ["run"]
    assert kinds(reconcile(config, run.name)) == ["run", "gone"]
    check_agreed(config, run, memory)

    memory.runs.clear()
    memory.versions.clear()
    memory.aliases.clear()
    assert kinds(reconcile(config, run.name)) == ["run", "register", "metrics"]
    assert aliases(memory) == {"resume-digits": saved[1], "best": saved[1]}
    assert sorted(row.step for row in stored_run(memory).rows) == [2]  # 1 went with its checkpoint
    check_agreed(config, run, memory)


def test_a_dead_attempt_is_not_running(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """Killed with all its processes, so that nobody could say so: silence tells. While it lives,
    nothing of its run is touched, however much is missing.
    """
    trained(run, 1)
    reconcile(config, run.name)
    run.put_claim(2, process=elsewhere())
    stored_run(memory).status = "running"
    memory.versions.clear()
    heart = Heart(run.store, run.layout, 2, interval=0.1)
    heart.start()
    told: list[str] = []
    try:
        report = reconcile(config, run.name, tell=told.append)
    finally:
        heart.stop(ended=False)
    assert report.changes == []
    assert [one.kind for one in report.left] == ["register", "alias"]
    assert "attempt 2 is alive" in report.notes[0]
    assert "watching the heartbeat" in told[0]
    assert (stored_run(memory).status, versions(memory)) == ("running", [])

    assert kinds(reconcile(config, run.name)) == ["register", "alias", "status"]
    assert stored_run(memory).status == "stopped"
    check_agreed(config, run, memory)
    trained(run, 5)
    assert "attempt 2 was claimed and never trained" in reconcile(config, run.name).notes


def test_bytes_that_nothing_needs(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """Data of a write that was never committed goes after the grace, here and without a registry;
    before it, it stays.
    """
    attempt, _ = trained(run, 1)
    write_state(run.store, run.layout, small_state(7), write_id=f"a{attempt.number:04d}-s0009-x")
    assert "orphan" not in kinds(reconcile(config, run.name))
    now = msgspec.structs.replace(config, retention=RetentionConfig(grace=0.001))
    plan = reconcile(now, run.name, dry_run=True)
    assert kinds(plan) == ["orphan"]
    assert "the grace of 0.001 s is over" in plan.changes[0].why
    assert reconcile(now, run.name).changes == plan.changes
    check_agreed(now, run, memory)


def test_all_runs_of_a_store(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """What is wrong with one run stands in its report; a registry that is away, in all of them."""
    trained(run, 1)
    other = MadeRun(run.store, "another")
    trained(other, 1)
    broken = MadeRun(run.store, "broken")
    run.store.put(broken.layout.run_record, b"{}")
    memory.available = False
    away = {report.run: report.problem for report in reconcile_all(config)}
    assert list(away) == ["another", "broken", "digits"]
    assert ["switched off" in str(problem) for problem in away.values()] == [True, False, True]
    memory.available = True
    reports = {report.run: report for report in reconcile_all(config)}
    assert "cannot be identified" in str(reports["broken"].problem)
    assert {one.description.run for one in memory.runs.values()} == {"another", "digits"}
    check_agreed(config, run, memory)
    with pytest.raises(CheckpointNotFoundError):
        reconcile(config, "none")
