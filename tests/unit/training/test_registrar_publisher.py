"""Publishing an attempt: what is committed gets registered, in order, once, and by its owner."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.made_runs import MadeRun

from ckpt_tasks.checkpointer.marks import mark
from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError, RegistryRefusedError, StaleAttemptError
from ckpt_tasks.events import CheckpointRegistered, Event, MetricsReplayed, Warned
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import last_promotion
from ckpt_tasks.format.records import CommitRecord, PromotionRecord, now
from ckpt_tasks.registry.base import Registration, Registry, RunDescription
from ckpt_tasks.testing import FakeClock, MemoryRegistry, RegistryMemory
from ckpt_tasks.training.registration.promotions import record_promotion
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.types import CheckpointId, MetricRow, Number


@pytest.fixture
def run() -> MadeRun:
    """A run in memory."""
    return MadeRun()


@pytest.fixture
def memory() -> RegistryMemory:
    """What all registries of a test share."""
    return RegistryMemory()


def _publisher(
    run: MadeRun,
    memory: RegistryMemory,
    attempt: int,
    events: list[Event] | None = None,
    *,
    best: str | None = None,
    registry: Registry | None = None,
    clock: FakeClock | None = None,
) -> Publisher:
    return Publisher(
        run.store,
        run.layout,
        Fence(run.store, run.layout, attempt),
        registry or MemoryRegistry(memory),
        RegistryConfig(best=best),
        RunDescription(
            run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
        ),
        [].append if events is None else events.append,
        clock=clock or FakeClock(),
    )


def _versions(memory: RegistryMemory) -> list[str]:
    return [version.checkpoint for version in memory.versions]


def _aliased(memory: RegistryMemory, alias: str) -> str:
    return next(v.checkpoint for v in memory.versions if v.version == memory.aliases[alias])


def _texts(*checkpoints: CheckpointId) -> list[str]:
    return [str(checkpoint) for checkpoint in checkpoints]


def test_registers_what_earlier_attempts_left(run: MadeRun, memory: RegistryMemory) -> None:
    """Committed checkpoints of the lineage that nobody registered are, oldest first."""
    first = run.begin()
    saved = [first.save(1), first.save(2)]
    second = run.begin()
    _publisher(run, memory, second.number).publish()
    assert _versions(memory) == _texts(*saved)
    assert _aliased(memory, "resume-digits") == str(saved[-1])


def test_what_has_expired_is_not_registered_again(run: MadeRun, memory: RegistryMemory) -> None:
    """A collection that was killed has made the registry forget it, and removes it yet."""
    first = run.begin()
    expired, kept = first.save(1), first.save(2)
    mark(run.store, run.layout, "expired", expired, why="a test", by="a test")
    _publisher(run, memory, run.begin().number).publish()
    assert _versions(memory) == _texts(kept)


def test_a_second_publisher_repeats_nothing(run: MadeRun, memory: RegistryMemory) -> None:
    """One that takes over from a killed one registers only what is missing, in the same run."""
    attempt = run.begin()
    saved = [attempt.save(1)]
    _publisher(run, memory, attempt.number).publish()
    saved.append(attempt.save(2))
    again = _publisher(run, memory, attempt.number)
    again.add_commit(str(saved[0]))
    again.add_commit(str(saved[1]))
    again.publish()
    assert _versions(memory) == _texts(*saved)
    assert len(memory.runs) == 1


def test_a_registry_that_is_away_loses_nothing(run: MadeRun, memory: RegistryMemory) -> None:
    """What waits is counted, and published once the registry is back."""
    attempt = run.begin()
    publisher = _publisher(run, memory, attempt.number)
    memory.available = False
    saved = attempt.save(1)
    publisher.add_commit(str(saved))
    publisher.add_rows([("loss", 0.5, 1, 1000)])
    with pytest.raises(RegistryError):
        publisher.publish()
    assert publisher.queued == 3
    memory.available = True
    publisher.publish()
    publisher.end("finished")
    (stored,) = memory.runs.values()
    assert _versions(memory) == [str(saved)]
    assert [(row.key, row.step) for row in stored.rows] == [("loss", 1)]
    assert stored.status == "finished"
    assert publisher.queued == 0


def test_an_alias_that_others_have_moved_on_stays(run: MadeRun, memory: RegistryMemory) -> None:
    """`reconcile` has published in the name of an attempt that stood still, a commit among it whose
    answer was lost: what the attempt's own registrar still has in its queue is older.
    """
    attempt = run.begin()
    publisher = _publisher(run, memory, attempt.number)
    publisher.publish()
    waiting, unknown = attempt.save(1), attempt.save(2)
    publisher.add_commit(str(waiting))
    _publisher(run, memory, attempt.number).publish()
    publisher.publish()
    assert _aliased(memory, "resume-digits") == str(unknown)
    last = attempt.save(3)
    publisher.add_commit(str(last))
    publisher.publish()
    assert _aliased(memory, "resume-digits") == str(last)


class RefusingRegistry(MemoryRegistry):
    """Refuses to register some checkpoints and to set one `alias`, and loses the answer a number
    of times when an alias is moved.
    """

    def __init__(
        self,
        memory: RegistryMemory,
        *refused: CheckpointId,
        aliases: int = 0,
        alias: str | None = None,
    ) -> None:
        super().__init__(memory)
        self._alias = alias
        self._refused = set(_texts(*refused))
        self._aliases = aliases

    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        if record.id in self._refused:
            raise RegistryRefusedError(f"did not register {record.id}: INVALID_PARAMETER_VALUE")
        return super().register(record, uri=uri, manifest=manifest)

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        if any(row.time_ms < 0 for row in rows):
            raise RegistryRefusedError("did not take rows: INVALID_PARAMETER_VALUE")
        super().log_metrics(rows)

    def set_alias(self, alias: str, registration: Registration) -> None:
        if alias == self._alias:
            raise RegistryRefusedError("it is reserved")
        self._aliases -= 1
        if self._aliases >= 0:
            raise RegistryError("the answer was lost")
        super().set_alias(alias, registration)


def test_a_refused_checkpoint_blocks_no_other(run: MadeRun, memory: RegistryMemory) -> None:
    """Refused again and again, a checkpoint is set aside, which is told with the reason; those
    behind it are registered; the next attempt tries it again.
    """
    attempt = run.begin()
    saved = [attempt.save(1), attempt.save(2), attempt.save(3)]
    events: list[Event] = []
    publisher = _publisher(
        run, memory, attempt.number, events, registry=RefusingRegistry(memory, saved[1])
    )
    for _ in range(2):
        with pytest.raises(RegistryError):
            publisher.publish()
    assert _versions(memory) == _texts(saved[0])
    publisher.publish()
    assert _versions(memory) == _texts(saved[0], saved[2])
    assert publisher.queued == 0
    (warned,) = [event.message for event in events if isinstance(event, Warned)]
    assert warned.startswith(f"{saved[1]} is set aside")
    assert "INVALID_PARAMETER_VALUE" in warned
    _publisher(run, memory, run.begin().number).publish()
    assert _versions(memory) == _texts(saved[0], saved[2], saved[1])
    assert _aliased(memory, "resume-digits") == str(saved[2])


def test_nothing_is_set_aside_for_a_deleted_run(run: MadeRun, memory: RegistryMemory) -> None:
    """Where the run itself was deleted in the registry everything is refused, and all waits."""
    attempt = run.begin()
    saved = attempt.save(1)
    registry = RefusingRegistry(memory, saved)
    publisher = _publisher(run, memory, attempt.number, registry=registry)
    with pytest.raises(RegistryRefusedError):
        publisher.publish()
    (stored,) = memory.runs.values()
    stored.deleted = True
    for _ in range(5):
        with pytest.raises(RegistryError):
            publisher.publish()
    assert publisher.queued == 1


def test_refused_rows_block_no_others(run: MadeRun, memory: RegistryMemory) -> None:
    """Rows that the registry refuses are left out and told, once for each metric; all others
    are sent, and checkpoints registered.
    """
    attempt = run.begin()
    events: list[Event] = []
    publisher = _publisher(run, memory, attempt.number, events, registry=RefusingRegistry(memory))
    refused = {3, 4, 9}
    publisher.add_rows([("accuracy", 0.9, 1, 1)])
    publisher.add_rows(
        [("loss", 0.5, step, -1 if step in refused else step) for step in range(1, 12)]
    )
    saved = attempt.save(11)
    publisher.add_commit(str(saved))
    publisher.publish()
    (stored,) = memory.runs.values()
    assert {row.step for row in stored.rows} == set(range(1, 12)) - refused
    assert _versions(memory) == _texts(saved)
    (warned,) = [event.message for event in events if isinstance(event, Warned)]
    assert "the metric 'loss' of step 3" in warned


def test_a_promotion_that_is_refused_blocks_no_other(run: MadeRun, memory: RegistryMemory) -> None:
    """Two aliases come back with the registration that was lost, one of which the registry does
    not take: that is told, and the next attempt tries it again.
    """
    attempt = run.begin()
    saved = attempt.save(1)
    for alias in ("latest", "paper"):
        promotion = PromotionRecord(
            uid=run.identity.uid,
            checkpoint=str(saved),
            alias=alias,
            registry=MemoryRegistry.name,
            registered_model="toys",
            model_id="lost",
            at=now(),
        )
        record_promotion(run.store, run.layout, promotion)
    events: list[Event] = []
    registry = RefusingRegistry(memory, alias="latest")
    _publisher(run, memory, attempt.number, events, registry=registry).publish()
    assert memory.aliases.keys() == {"resume-digits", "paper"}
    (warned,) = [event.message for event in events if isinstance(event, Warned)]
    assert warned == "alias 'latest' is not brought back: it is reserved"
    assert run.store.exists(last_promotion("checkpoints", "paper"))
    _publisher(run, memory, run.begin().number).publish()
    assert _aliased(memory, "latest") == str(saved)


def test_an_alias_whose_answer_was_lost(run: MadeRun, memory: RegistryMemory) -> None:
    """A checkpoint counts as registered only with its aliases: all is repeated, and told once."""
    attempt = run.begin()
    saved = attempt.save(1, metrics={"loss": 0.5})
    events: list[Event] = []
    registry = RefusingRegistry(memory, aliases=2)
    publisher = _publisher(run, memory, attempt.number, events, best="loss:min", registry=registry)
    for _ in range(2):
        with pytest.raises(RegistryError):
            publisher.publish()
    publisher.publish()
    assert _aliased(memory, "resume-digits") == _aliased(memory, "best") == str(saved)
    told = [event.checkpoint for event in events if isinstance(event, CheckpointRegistered)]
    assert told == _texts(saved) == _versions(memory)


def test_a_backlog_is_queued_once(run: MadeRun, memory: RegistryMemory) -> None:
    """However often the registry fails once it is found: else the queue would grow with each try,
    as long as it does.
    """
    sent: list[int] = []

    class Watched(RefusingRegistry):
        def log_metrics(self, rows: Sequence[MetricRow]) -> None:
            sent.extend(row.step for row in rows)
            super().log_metrics(rows)

    attempt = run.begin()
    attempt.save(1)
    _publisher(run, memory, attempt.number).publish()
    attempt.save(2, rows=[("loss", 0.5, 2, 2)])
    publisher = _publisher(run, memory, attempt.number, registry=Watched(memory, aliases=3))
    for _ in range(3):
        with pytest.raises(RegistryError):
            publisher.publish()
    publisher.publish()
    assert sent == [2]


def test_a_stale_attempt_publishes_nothing(run: MadeRun, memory: RegistryMemory) -> None:
    """Once a later attempt is claimed, neither versions nor rows nor a status are sent."""
    attempt = run.begin()
    publisher = _publisher(run, memory, attempt.number)
    publisher.publish()
    saved = attempt.save(1)
    run.claim()
    publisher.add_commit(str(saved))
    publisher.add_rows([("loss", 0.5, 1, 1000)])
    with pytest.raises(StaleAttemptError):
        publisher.publish()
    with pytest.raises(StaleAttemptError):
        publisher.end("failed")
    (stored,) = memory.runs.values()
    assert memory.versions == []
    assert memory.aliases == {}
    assert not stored.rows
    assert stored.status == "running"


def test_a_stale_attempt_tells_no_story(run: MadeRun, memory: RegistryMemory) -> None:
    """One that was paused finds its note overdue, and leaves the later attempt's as it is."""
    clock = FakeClock()
    publisher = _publisher(run, memory, run.begin().number, clock=clock)
    publisher.publish()
    (stored,) = memory.runs.values()
    stored.note = "told by the later attempt"
    run.claim()
    clock.advance(3600)
    with pytest.raises(StaleAttemptError):
        publisher.publish()
    assert stored.note == "told by the later attempt"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"run_id": "run-1"}'])
def test_damaged_ids_are_searched_for(run: MadeRun, memory: RegistryMemory, damage: bytes) -> None:
    """With its ids file damaged, the run is found by its uid; that is told, and no second made."""
    attempt = run.begin()
    _publisher(run, memory, attempt.number).publish()
    path = run.layout.registry_ids("memory")
    run.store.put(path, damage)
    events: list[Event] = []
    _publisher(run, memory, attempt.number, events).publish()
    assert len(memory.runs) == 1
    assert any(isinstance(event, Warned) and path in event.message for event in events)
    quiet: list[Event] = []
    _publisher(run, memory, attempt.number, quiet).publish()
    assert not [event for event in quiet if isinstance(event, Warned)]


def test_unhealthy_checkpoints_get_no_alias(run: MadeRun, memory: RegistryMemory) -> None:
    """One that holds NaN is registered, and neither resumed from nor best."""
    attempt = run.begin()
    healthy = attempt.save(1, metrics={"loss": 0.5})
    sick = attempt.save(2, metrics={"loss": 0.1}, nonfinite=["model.weight"])
    _publisher(run, memory, attempt.number, best="loss:min").publish()
    assert _versions(memory) == _texts(healthy, sick)
    assert _aliased(memory, "resume-digits") == str(healthy)
    assert _aliased(memory, "best") == str(healthy)


@pytest.mark.parametrize(("mode", "expected"), [("min", 2), ("max", 3)])
def test_best_follows_its_metric(
    run: MadeRun, memory: RegistryMemory, mode: str, expected: int
) -> None:
    """The alias stays on the best value either way, whatever comes later."""
    attempt = run.begin()
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.9), (4, 0.4)):
        attempt.save(step, metrics={"loss": loss})
    _publisher(run, memory, attempt.number, best=f"loss:{mode}").publish()
    assert CheckpointId.parse(_aliased(memory, "best")).step == expected


def test_a_lost_best_alias_is_caught_up(run: MadeRun, memory: RegistryMemory) -> None:
    """Where its registrar died between registering and moving the alias, the next one moves it."""
    attempt = run.begin()
    best = attempt.save(1, metrics={"loss": 0.1})
    attempt.save(2, metrics={"loss": 0.9})
    _publisher(run, memory, attempt.number, best="loss:min").publish()
    del memory.aliases["best"]
    _publisher(run, memory, attempt.number, best="loss:min").publish()
    assert _aliased(memory, "best") == str(best)


def _publish(run: MadeRun, memory: RegistryMemory, *losses: float, mode: str = "min") -> list[str]:
    """An attempt of `run` that saves these, published; ids of its checkpoints."""
    attempt = run.begin()
    start = 10 * attempt.number
    saved = [attempt.save(start + n, metrics={"loss": loss}) for n, loss in enumerate(losses)]
    publisher = _publisher(run, memory, attempt.number, best=f"loss:{mode}")
    publisher.publish()
    publisher.end("finished")
    return _texts(*saved)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_a_later_run_never_takes_best_for_a_worse_value(
    memory: RegistryMemory, mode: str, sign: int
) -> None:
    """The alias is one for all runs of a registered model; a better value of any run takes it."""
    first, second = MadeRun(name="b1"), MadeRun(name="b2")
    best, _ = _publish(first, memory, sign * 1.0, sign * 2.0, mode=mode)
    _publish(second, memory, sign * 9.0, sign * 1.0, mode=mode)
    (holder,) = [v for v in memory.versions if v.version == memory.aliases["best"]]
    assert (holder.checkpoint, holder.run_id) == (best, "run-1")
    better, _ = _publish(second, memory, sign * 0.5, sign * 0.8, mode=mode)
    (holder,) = [v for v in memory.versions if v.version == memory.aliases["best"]]
    assert (holder.checkpoint, holder.run_id) == (better, "run-2")


def test_best_stays_after_a_resume(run: MadeRun, memory: RegistryMemory) -> None:
    """Later attempts move it neither for worse nor for equal values."""
    best = _publish(run, memory, 1.0, 3.0)[0]
    _publish(run, memory, 1.0, 2.0)
    assert _aliased(memory, "best") == best


def test_best_whose_version_was_deleted(run: MadeRun, memory: RegistryMemory) -> None:
    """The best of the checkpoints that are still registered takes its place."""
    attempt = run.begin()
    saved = [attempt.save(step, metrics={"loss": float(step)}) for step in (1, 2, 3)]
    publisher = _publisher(run, memory, attempt.number, best="loss:min")
    publisher.publish()
    for step, deleted in enumerate(saved[:2], start=1):
        memory.versions[:] = [v for v in memory.versions if v.checkpoint != str(deleted)]
        if step == 1:
            del memory.aliases["best"]  # it goes with its version
        publisher.add_commit(str(attempt.save(10 + step, metrics={"loss": 9.0})))
        publisher.publish()
        assert _aliased(memory, "best") == str(saved[step])


def test_best_leaves_a_damaged_checkpoint(run: MadeRun, memory: RegistryMemory) -> None:
    """Weights that cannot be loaded are no longer the best ones."""
    best, second = _publish(run, memory, 1.0, 2.0)
    mark(run.store, run.layout, "quarantined", CheckpointId.parse(best), why="bits", by="a test")
    _publish(run, memory, 5.0)
    assert _aliased(memory, "best") == second


@pytest.mark.parametrize(
    ("recorded", "logged", "told"),
    [({}, "val_loss", True), ({"val_loss": 1.0}, "val_loss", False), ({}, "loss", False)],
)
def test_a_best_that_no_checkpoint_can_be_is_told(
    run: MadeRun,
    memory: RegistryMemory,
    recorded: dict[str, Number],
    logged: str,
    *,
    told: bool,
) -> None:
    """Where its metric was logged, but never for a step that was saved, the end of the attempt
    says so once, and what to set.
    """
    attempt = run.begin()
    events: list[Event] = []
    publisher = _publisher(run, memory, attempt.number, events, best="val_loss:min")
    publisher.add_rows([(logged, 1.0, 20, 1000)])
    publisher.add_commit(str(attempt.save(21, metrics=recorded)))
    publisher.publish()
    publisher.end("finished")
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == told
    assert all("every_epochs = 1" in warning for warning in warnings)


def test_replayed_rows_are_compared_not_sent(run: MadeRun, memory: RegistryMemory) -> None:
    """Steps done again are counted where they differ; NaN equals NaN; new ones are sent."""
    first = run.begin()
    publisher = _publisher(run, memory, first.number)
    nan = "nan"
    publisher.add_rows([("loss", 0.5, 1, 1), ("loss", 0.4, 2, 2), ("norm", nan, 2, 2)])
    publisher.publish()
    second = run.begin()
    events: list[Event] = []
    again = _publisher(run, memory, second.number, events)
    again.add_rows([("loss", 0.5, 1, 8), ("loss", 0.3, 2, 9), ("norm", nan, 2, 9)])
    again.add_rows([("loss", 0.2, 3, 9)])
    again.publish()
    (replayed,) = [event for event in events if isinstance(event, MetricsReplayed)]
    assert (replayed.run, replayed.attempt) == ("digits", 2)
    found = replayed.replay
    assert (found.steps, found.values, found.diverged_steps) == (2, 3, 1)
    assert found.keys == {"loss": 1}
    (stored,) = memory.runs.values()
    assert stored.tags["replay"].startswith(
        "diverged: 1 of 2 steps, attempt 2; first step 2 (loss);"
    )
    assert "- Attempt 2 replayed 2 steps, 1 came out differently, first step 2" in stored.note
    losses = [(row.step, row.value) for row in stored.rows if row.key == "loss"]
    assert losses == [(1, 0.5), (2, 0.4), (3, 0.2)]


def test_what_was_saved_counts_for_a_checkpoint(run: MadeRun, memory: RegistryMemory) -> None:
    """Behind a replay that came out differently the registry keeps the first value of a step; a
    checkpoint has the one of its own state, and by that it is the best.
    """
    first = run.begin()
    publisher = _publisher(run, memory, first.number, best="loss:min")
    publisher.add_rows([("loss", 0.5, 1, 1), ("loss", 0.9, 2, 2)])
    publisher.add_commit(str(first.save(1, rows=[("loss", 0.5, 1, 1)], metrics={"loss": 0.5})))
    publisher.publish()
    second = run.begin()
    publisher = _publisher(run, memory, second.number, best="loss:min")
    publisher.add_rows([("loss", 0.25, 2, 9)])
    saved = str(second.save(2, rows=[("loss", 0.25, 2, 9)], metrics={"loss": 0.25}))
    publisher.add_commit(saved)
    publisher.publish()
    (stored,) = memory.runs.values()
    assert [(row.step, row.value) for row in stored.rows] == [(1, 0.5), (2, 0.9)]
    assert _aliased(memory, "best") == saved
    assert memory.metrics[memory.aliases["best"]] == {"loss": 0.25}


def test_journals_fill_the_gap_of_an_ended_attempt(run: MadeRun, memory: RegistryMemory) -> None:
    """An attempt that has ended is published from its checkpoints: rows, too, each once."""
    attempt = run.begin()
    attempt.save(1, rows=[("loss", 0.5, 1, 1)])
    attempt.save(2, rows=[("loss", 0.4, 2, 2)])
    for _ in range(2):
        publisher = _publisher(run, memory, attempt.number)
        publisher.publish()
        publisher.end("finished")
    (stored,) = memory.runs.values()
    assert [(row.step, row.value) for row in stored.rows] == [(1, 0.5), (2, 0.4)]
    assert len(memory.versions) == 2


def test_rows_come_before_what_is_found_at_first(run: MadeRun, memory: RegistryMemory) -> None:
    """A registry that took long to answer: by then the attempt has committed what it has not told
    yet, and a checkpoint is registered only behind the rows that it shows.
    """
    sent: list[int] = []

    class Watched(MemoryRegistry):
        def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
            sent.append(len(self.history("loss", 0)))
            return super().register(record, uri=uri, manifest=manifest)

    attempt = run.begin()
    saved = attempt.save(2, rows=[("loss", 0.5, 1, 1), ("loss", 0.4, 2, 2)])
    publisher = _publisher(run, memory, attempt.number, registry=Watched(memory))
    publisher.publish()
    publisher.add_rows([("loss", 0.5, 1, 1), ("loss", 0.4, 2, 2)])
    publisher.add_commit(str(saved))
    publisher.publish()
    (stored,) = memory.runs.values()
    assert (sent, len(stored.rows)) == ([2], 2)
