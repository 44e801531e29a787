"""A whole store is maintained: each run by itself, beside trainings, and again without a change."""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from support.made_runs import MadeRun, small_state, write_state
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.checkpointer import marks
from ckpt_tasks.checkpointer.catalog import list_run_names
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    StoreConfig,
)
from ckpt_tasks.errors import MaintenanceError, RegistryError
from ckpt_tasks.retention import pin
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.tasks import Maintenance, RunMaintenance, check_maintained, maintain
from ckpt_tasks.tasks.reconcile_all import reconcile_each
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.types import CheckpointId


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> RegistryMemory:
    """The registry's memory, which a configuration that names a registry opens."""
    memory = RegistryMemory()
    for name in ("reconcile", "registered"):
        module = importlib.import_module(f"ckpt_tasks.tasks.{name}")
        monkeypatch.setattr(module, "load_registry", lambda config: MemoryRegistry(memory))
    return memory


@pytest.fixture
def config(tmp_path: Path) -> CheckpointConfig:
    """A store, a registry, rules, and an attempt that counts as dead soon."""
    return CheckpointConfig(
        store=StoreConfig(url=str(tmp_path / "store")),
        registry=RegistryConfig(tracking_uri="memory://"),
        attempt=AttemptConfig(heartbeat=0.1, takeover_after=0.5),
        retention=RetentionConfig(latest=2, grace=0.001),
    )


@pytest.fixture
def store(config: CheckpointConfig) -> Store:
    return open_store(config.store, for_writing=True)


def trained(store: Store, name: str, *steps: int) -> tuple[MadeRun, list[CheckpointId]]:
    """A run of one attempt that has ended, with a checkpoint at each step."""
    run = MadeRun(store, name)
    attempt = run.begin()
    saved = [attempt.save(step) for step in steps]
    run.fail(attempt.number, step=steps[-1])
    return run, saved


def without_registry(config: CheckpointConfig, **retention: object) -> CheckpointConfig:
    rules = RetentionConfig(**retention)  # type: ignore[arg-type]
    return msgspec.structs.replace(config, registry=RegistryConfig(), retention=rules)


def lines(done: Maintenance) -> dict[str, RunMaintenance]:
    return {run.run: run for run in done.runs}


def versions(memory: RegistryMemory) -> list[tuple[str, str]]:
    """Run and checkpoint of everything registered."""
    names = {run_id: run.description.run for run_id, run in memory.runs.items()}
    return sorted((names[one.run_id], one.checkpoint) for one in memory.versions)


def test_every_run_gets_what_it_needs(
    config: CheckpointConfig, store: Store, memory: RegistryMemory
) -> None:
    """Registered, corrected, expired, collected; what is wrong with a run is told, and of that run
    nothing is deleted. A dry run tells it and changes nothing, a repetition finds nothing to do.
    """
    run, many = trained(store, "many", 1, 2, 3, 4)
    idle, one = trained(store, "one", 7)
    maintain(msgspec.structs.replace(config, retention=RetentionConfig()))
    store.delete(idle.layout.commit(one[0]))
    (last,) = trained_later(idle, 9)
    write_state(store, idle.layout, small_state(7), write_id="a0001-s0009-x")
    pin(store, run.layout, many[0], why="the paper", by="a test")
    _, missing = trained(store, "unregistered", 5)
    damaged, _ = trained(store, "damaged", 1, 2, 3)
    damaged.damage(damaged.layout.run_record, position=3)
    later, newer = trained(store, "later", 1, 2, 3)
    later.make_later_version(newer[0])
    before, known = run.contents(), versions(memory)

    told = lines(maintain(config, dry_run=True))
    assert (run.contents(), versions(memory)) == (before, known)
    done = maintain(config)
    found = lines(done)

    assert (found["many"].expired, found["many"].collected, found["many"].kept) == (1, 1, 3)
    assert told["many"].expired == 1
    assert found["many"].freed > 0
    assert (found["one"].registered, found["one"].corrected >= 1) == (1, True)
    assert not [path for path in run.contents() if "a0001-s0009-x" in path]
    assert (found["unregistered"].registered, found["unregistered"].expired) == (1, 0)
    assert versions(memory) == sorted(
        [
            *(("many", str(many[at])) for at in (0, 2, 3)),
            ("one", str(last)),
            ("unregistered", str(missing[0])),
            *(("later", str(at)) for at in newer[1:]),
        ]
    )
    assert [run.run for run in done.problems] == ["damaged", "later"]
    assert "cannot be identified" in str(found["damaged"].problem)
    assert "teleport" in str(found["later"].problem)
    for name in ("damaged", "later"):
        kept = {path: data for path, data in before.items() if path.startswith(f"{name}/")}
        assert kept.items() <= run.contents().items()
    with pytest.raises(MaintenanceError, match=r"of 5 runs .*'damaged'.* and 1 more"):
        check_maintained(done)

    contents, known = run.contents(), versions(memory)
    again = maintain(config)
    assert not [line for line in again.runs if line.changed]
    assert (run.contents(), versions(memory)) == (contents, known)
    assert again.total.kept == done.total.kept > 0


def trained_later(run: MadeRun, *steps: int) -> list[CheckpointId]:
    """Another attempt, which has ended too."""
    attempt = run.begin()
    saved = [attempt.save(step) for step in steps]
    run.fail(attempt.number, step=steps[-1])
    return saved


def test_patterns_choose_runs(config: CheckpointConfig, store: Store) -> None:
    """Any of several; the others are not looked at."""
    for name in ("nightly-1", "nightly-2", "mine", "yours"):
        trained(store, name, 1, 2)
    config = without_registry(config, latest=1, grace=0.001)
    done = maintain(config, ["nightly-*", "min?"])
    assert [(line.run, line.collected) for line in done.runs] == [
        ("mine", 1),
        ("nightly-1", 1),
        ("nightly-2", 1),
    ]
    assert lines(maintain(config, ["yours"], dry_run=True))["yours"].expired == 1


def test_maintenance_beside_a_training_loses_nothing(
    config: CheckpointConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, while an attempt goes on from an old run and refers to what it holds: whatever
    is left is whole, and the newest is among it.
    """
    config = without_registry(config, latest=2, grace=GRACE)
    monkeypatch.setattr(marks, "this_uptime", lambda: None)  # which no file's time makes older
    run = RetainedRun(store)
    first = run.begin()
    for step in range(1, 9):
        first.save(step, state_of(step))
    run.expire(latest=2)
    for path in Path(config.store.url).rglob("*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 2 * GRACE))
    ends = threading.Event()

    def keep_maintaining() -> list[Maintenance]:
        done = [maintain(config)]
        while not ends.is_set():
            done.append(maintain(config))
        return done

    with ThreadPoolExecutor(2) as pool:
        maintaining = [pool.submit(keep_maintaining) for _ in range(2)]
        attempt = run.begin()
        try:
            saved = [attempt.save(step, state_of(step)) for step in range(9, 29)]
        finally:
            ends.set()
        done = [one for each in maintaining for one in each.result()]

    assert [line.problem for one in done for line in one.problems] == []
    assert sum(one.total.collected for one in done) == 6
    assert run.left()[-1] == saved[-1]
    assert set(saved) <= set(run.left())
    for checkpoint in run.left():
        assert verify_checkpoint(store, run.name, checkpoint).ok


@dataclasses.dataclass
class AbsentRegistry(MemoryRegistry):
    """Answers nothing, and takes 25 seconds for it."""

    asked: list[float]

    def find_run(self, description: object) -> None:
        self.asked.append(self.asked[-1] + 25.0)
        raise RegistryError("it did not answer in time")


def test_registry_that_is_away_is_not_waited_for_a_thousand_times(
    config: CheckpointConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three runs and a minute the rest is told so; nothing is marked or deleted there."""
    for number in range(6):
        trained(store, f"run-{number}", 1)
    now = [0.0]
    module = importlib.import_module("ckpt_tasks.tasks.reconcile")
    monkeypatch.setattr(module, "load_registry", lambda config: AbsentRegistry(now))
    reports = list(reconcile_each(store, config, list_run_names(store), clock=lambda: now[-1]))
    assert len(now) == 1 + 3
    assert ["did not answer" in str(report.problem) for report in reports] == [True] * 3 + [
        False
    ] * 3
    assert "not looked at: for the 3 runs before, this failed, and took 75 s" in str(
        reports[-1].problem
    )
