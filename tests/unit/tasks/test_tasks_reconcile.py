"""Store and registry agree afterwards, whatever they disagreed about; and a repetition is idle."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import msgspec
import pytest
from support.made_runs import (
    MadeAttempt,
    MadeRun,
    elsewhere,
    memory_store,
    small_state,
    write_state,
)

from ckpt_tasks.config import (
    AttemptConfig,
    CheckpointConfig,
    RegistryConfig,
    RetentionConfig,
    StoreConfig,
)
from ckpt_tasks.errors import CheckpointNotFoundError, CkptTasksError
from ckpt_tasks.events import Event, MetricsReplayed
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import Heart
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import ReconcileReport, promote, reconcile, reconcile_all
from ckpt_tasks.testing import (
    Fault,
    FaultInjector,
    FaultyRegistry,
    FaultyStore,
    MemoryRegistry,
    RegistryMemory,
)
from ckpt_tasks.testing.memory_registry import MemoryRun
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.registration.tail import write_tail
from ckpt_tasks.types import CheckpointId, MetricRow


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> RegistryMemory:
    """The registry's memory, which a configuration that names a registry opens."""
    memory = RegistryMemory()
    for name in ("reconcile", "promote"):
        module = importlib.import_module(f"ckpt_tasks.tasks.{name}")
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


def test_a_complete_run_that_was_trained_on_is_not_finished(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """Its registry still has the end before, as the later attempt never reached it."""
    _, saved = trained(run, 1)
    run.complete(saved[0])
    reconcile(config, run.name)
    assert stored_run(memory).status == "finished"
    trained(run, 2, resume=saved[0])
    report = reconcile(config, run.name)
    assert "status" in kinds(report)
    assert stored_run(memory).status == "failed"
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

    empty(memory)
    assert kinds(reconcile(config, run.name)) == ["run", "register", "metrics"]
    assert aliases(memory) == {"resume-digits": saved[1], "best": saved[1]}
    assert sorted(row.step for row in stored_run(memory).rows) == [2]  # 1 went with its checkpoint
    check_agreed(config, run, memory)


def empty(memory: RegistryMemory) -> None:
    """All that the registry had is lost."""
    memory.runs.clear()
    memory.versions.clear()
    memory.aliases.clear()


def test_promotions_come_back_with_what_was_lost(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """An alias is one for all runs: the last that was promoted has it, in whatever order they are
    told again. What a person has done about an alias stands.
    """
    _, saved = trained(run, 1, 2)
    other = MadeRun(run.store, "another")
    _, others = trained(other, 1)
    reconcile_all(config)
    promote(config, run.name, saved[0], "paper")
    promote(config, run.name, saved[1], "paper")
    promote(config, run.name, saved[0], "candidate")
    assert promote(config, other.name, others[0], "candidate").unrecorded is None
    holders = dict(memory.aliases)

    del memory.aliases["paper"]
    check_agreed(config, run, memory)

    for in_order in (reconcile_all, lambda c: [reconcile(c, n) for n in (run.name, other.name)]):
        empty(memory)
        plan = reconcile(config, run.name, dry_run=True)
        assert [d.what for d in plan.changes if d.kind == "alias"] == ["paper"]
        in_order(config)
        names = {run_id: one.description.run for run_id, one in memory.runs.items()}
        held = {v.version: (names[v.run_id], v.checkpoint) for v in memory.versions}
        assert held[memory.aliases["paper"]] == (run.name, saved[1])
        assert held[memory.aliases["candidate"]] == (other.name, others[0])
        assert memory.aliases.keys() == holders.keys()
        check_agreed(config, run, memory)

    del memory.aliases["paper"]
    check_agreed(config, run, memory)

    (lost,) = [v for v in memory.versions if v.checkpoint == saved[1]]
    (kept,) = [v for v in memory.versions if (v.checkpoint, v.run_id) == (saved[0], lost.run_id)]
    memory.versions.remove(lost)
    memory.aliases["paper"] = kept.version
    run.store.put(run.layout.promotion("damaged"), b"{}")
    reconcile(config, run.name)
    assert memory.aliases["paper"] == kept.version


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reconciliation_that_stops_anywhere_is_completed_by_the_next(
    when: str, config: CheckpointConfig, memory: RegistryMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whichever operation of store or registry it stops, done or not: the registry ends as
    that of a reconciliation which nothing stops.
    """
    run = MadeRun(memory_store())
    _, saved = trained(run, 1, 2)
    module = importlib.import_module("ckpt_tasks.tasks.reconcile")
    promoting = importlib.import_module("ckpt_tasks.tasks.promote")
    monkeypatch.setattr(promoting, "open_store", lambda config: run.store)
    injector = FaultInjector()
    opened = FaultyStore(run.store, injector)
    monkeypatch.setattr(module, "open_existing_store", lambda config: opened)
    monkeypatch.setattr(
        module, "load_registry", lambda config: FaultyRegistry(MemoryRegistry(memory), injector)
    )
    reconcile(config, run.name)
    promote(config, run.name, saved[0], "paper")
    write_tail(run.store, run.layout, 1, [MetricRow("loss", 0.25, 3, 1003)])
    now = msgspec.structs.replace(config, retention=RetentionConfig(grace=1e-6))
    before = run.contents()

    def begin(*faults: Fault) -> None:
        for path in run.contents().keys() - before.keys():
            run.store.delete(path)
        for path, data in before.items():
            run.store.put(path, data)
        empty(memory)
        injector.faults, injector.log = list(faults), []

    def found() -> tuple[object, ...]:
        stored = stored_run(memory)
        return aliases(memory), versions(memory), list(stored.rows), stored.status, stored.note

    begin()
    reconcile(now, run.name)
    expected, operations = found(), len(injector.log)
    assert aliases(memory).keys() == {"resume-digits", "best", "paper"}
    assert operations > 60
    for number in range(1, operations + 1):
        begin(Fault(at=number, when=when))  # type: ignore[arg-type]
        stopped_at = injector.log
        with contextlib.suppress(CkptTasksError):
            reconcile(now, run.name)
        operation = stopped_at[number - 1]
        injector.faults = []
        assert reconcile(now, run.name).problem is None
        assert found() == expected, operation
        assert reconcile(now, run.name).changes == [], operation


def _publisher(
    config: CheckpointConfig,
    run: MadeRun,
    memory: RegistryMemory,
    attempt: MadeAttempt,
    events: list[Event],
) -> Publisher:
    description = RunDescription(
        run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
    )
    fence = Fence(run.store, run.layout, attempt.number)
    registry = MemoryRegistry(memory)
    return Publisher(
        run.store, run.layout, fence, registry, config.registry, description, events.append
    )


def test_an_emptied_registry_shows_no_divergence(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """Told again from the store it has no step behind the last checkpoint: there is nothing to
    compare an attempt that goes on with, and nothing is claimed.
    """
    first, _ = trained(run, 1, 2)
    publisher = _publisher(config, run, memory, first, [])
    publisher.add_rows([*rows(1, 2, 3)])
    publisher.publish()
    empty(memory)
    reconcile(config, run.name)
    events: list[Event] = []
    second = run.begin()
    publisher = _publisher(config, run, memory, second, events)
    publisher.add_rows([("loss", 0.7, step, 5000) for step in (3, 4)])
    publisher.publish()
    publisher.end("finished")
    assert not [event for event in events if isinstance(event, MetricsReplayed)]
    stored = stored_run(memory)
    assert {row.step: row.value for row in stored.rows} == {1: 1.0, 2: 0.5, 3: 0.7, 4: 0.7}
    assert "replay" not in stored.tags


def test_a_tail_is_sent_once_its_grace_is_over(
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory
) -> None:
    """What a dead attempt logged behind its last checkpoint, where that waits for a checkpoint:
    not while the run may go on.
    """
    attempt, _ = trained(run, 1, 2)
    tail = [MetricRow("loss", 0.25, 3, 1003)]
    write_tail(run.store, run.layout, attempt.number, tail)
    assert kinds(reconcile(config, run.name)) == ["run", "register", "register", "metrics"]
    assert sorted(row.step for row in stored_run(memory).rows) == [1, 2]
    check_agreed(config, run, memory)
    short = msgspec.structs.replace(config, retention=RetentionConfig(grace=1e-6))
    assert kinds(reconcile(short, run.name)) == ["metrics"]
    assert sorted(row.step for row in stored_run(memory).rows) == [1, 2, 3]
    check_agreed(short, run, memory)


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
    config: CheckpointConfig, run: MadeRun, memory: RegistryMemory, tmp_path: Path
) -> None:
    """Data of a write that was never committed, or not even completed, goes after the grace, here
    and without a registry; before it, it stays. The plan names both.
    """
    attempt, _ = trained(run, 1)
    write_state(run.store, run.layout, small_state(7), write_id=f"a{attempt.number:04d}-s0009-x")
    assert "orphan" not in kinds(reconcile(config, run.name))
    torn = tmp_path / f"store/{run.layout.data}a0001-s0001-x/.tmp-{'0' * 32}"
    torn.parent.mkdir()
    torn.write_bytes(b"half of it")
    now = msgspec.structs.replace(config, retention=RetentionConfig(grace=0.001))
    before = run.contents()
    plan = reconcile(now, run.name, dry_run=True)
    assert kinds(plan) == ["orphan", "orphan"]
    assert (run.contents(), torn.exists()) == (before, True)
    assert "never completed" in plan.changes[0].why
    assert "the grace of 0.001 s is over" in plan.changes[1].why
    assert reconcile(now, run.name).changes == plan.changes
    assert not torn.exists()
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
