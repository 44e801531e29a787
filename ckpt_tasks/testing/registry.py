"""Contract tests of a registry: an implementation subclasses them and brings its own helpers.

Example
-------
::

    class TestMyRegistry(RegistryTests):
        def open_registry(self):
            return MyRegistry(self.server)

        def run_ids(self, uid):
            return [run.id for run in self.server.runs if run.tags["uid"] == uid]

        ...
"""

from __future__ import annotations

import math
import uuid
from abc import ABC, abstractmethod

import msgspec
import pytest

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError, RegistryRefusedError
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import CommitRecord, LineageEntry
from ckpt_tasks.registry import (
    AliasHolder,
    Registration,
    Registry,
    RegistryRunIds,
    RunDescription,
    RunStatus,
)
from ckpt_tasks.registry.best import BEST, BestAlias
from ckpt_tasks.testing.registry_examples import example_description, example_record, rows_of

__all__ = ["RegistryTests", "example_description", "example_record", "rows_of"]

_ODD_KEY = "loss (train) [µ] a//b"


class RegistryTests(ABC):
    """What every registry must do.

    The abstract methods look into the registry's backend **without** the registry under test.
    """

    @abstractmethod
    def open_registry(self) -> Registry:
        """A registry of the same backend, as another process would open it."""

    @abstractmethod
    def run_ids(self, uid: str) -> list[str]:
        """Ids of all runs of a uid that are not deleted."""

    @abstractmethod
    def make_twin(self, description: RunDescription) -> RegistryRunIds:
        """Make one more run of the uid, as a process whose search came too early does."""

    @abstractmethod
    def status(self, run_id: str) -> RunStatus:
        """The run's status."""

    @abstractmethod
    def rows(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """Step and value of all rows of a metric, sorted."""

    @abstractmethod
    def checkpoints(self, run_id: str) -> list[str]:
        """Checkpoint ids of all registered versions of the run, doubles included, sorted."""

    @abstractmethod
    def alias(self, alias: str) -> str | None:
        """The version that an alias, as the backend spells it, points at."""

    @abstractmethod
    def tag(self, run_id: str, name: str) -> str | None:
        """The run's tag of this package's."""

    @abstractmethod
    def note(self, run_id: str) -> str:
        """The run's description."""

    def opened(self, description: RunDescription) -> tuple[Registry, str]:
        """A registry with a run open, and the run's id."""
        registry = self.open_registry()
        ids = registry.find_run(description) or registry.create_run(description)
        registry.open_run(ids, description)
        return registry, ids.run_id

    def register(self, registry: Registry, record: CommitRecord) -> Registration:
        """Register a record as the registrar does."""
        uri = f"s3://bucket/checkpoints/run/commits/{record.id}.json"
        return registry.register(record, uri=uri, manifest=encode(record))

    def test_unknown_run_is_not_found(self) -> None:
        """`find_run` of a uid that no run has returns None."""
        assert self.open_registry().find_run(example_description()) is None

    def test_run_is_found_by_its_uid(self) -> None:
        """A run that one process made is found by another, with the same ids."""
        description = example_description()
        ids = self.open_registry().create_run(description)
        assert self.open_registry().find_run(description) == ids

    def test_run_is_made_once(self) -> None:
        """`create_run` called twice leaves one run."""
        description = example_description()
        ids = self.open_registry().create_run(description)
        assert self.open_registry().create_run(description) == ids
        assert self.run_ids(description.uid) == [ids.run_id]

    def test_same_name_other_uid_is_another_run(self) -> None:
        """The uid is a run's identity, not its name."""
        first = example_description(run="same")
        second = example_description(run="same")
        registry = self.open_registry()
        assert registry.create_run(first).run_id != registry.create_run(second).run_id

    def test_unchosen_run_is_discarded(self) -> None:
        """Of two runs of one uid the discarded one goes, and a second discard is no error."""
        description = example_description()
        registry = self.open_registry()
        chosen = registry.create_run(description)
        twin = self.make_twin(description)
        registry.discard_run(twin)
        registry.discard_run(twin)
        assert self.run_ids(description.uid) == [chosen.run_id]

    def test_last_run_is_never_discarded(self) -> None:
        """A process that found the chosen run and then lost the race does not delete it."""
        description = example_description()
        registry = self.open_registry()
        ids = registry.create_run(description)
        registry.discard_run(ids)
        assert self.run_ids(description.uid) == [ids.run_id]

    def test_deleted_run_is_restored(self) -> None:
        """A run's state is told to any process; a deleted one comes back as it was."""
        description = example_description()
        registry, run_id = self.opened(description)
        twin = self.make_twin(description)
        assert registry.run_state(twin) == "running"
        assert registry.run_state(msgspec.structs.replace(twin, run_id="0" * 32)) is None
        registry.discard_run(twin)
        other = self.open_registry()
        assert other.run_state(twin) == "deleted"
        other.restore_run(twin)
        other.restore_run(twin)
        assert other.run_state(twin) == "running"
        assert sorted(self.run_ids(description.uid)) == sorted([run_id, twin.run_id])

    def test_unused_twins_are_told(self) -> None:
        """Other runs of the uid that nobody has used; never the run itself."""
        description = example_description()
        registry, _ = self.opened(description)
        ids = registry.find_run(description)
        assert ids is not None
        assert registry.unused_twins(ids) == []
        twin, used = self.make_twin(description), self.make_twin(description)
        other = self.open_registry()
        other.open_run(used, description)
        other.log_metrics(rows_of("loss", [1.0]))
        assert [one.run_id for one in registry.unused_twins(ids)] == [twin.run_id]

    def test_nothing_works_before_a_run_is_open(self) -> None:
        """Calls that need a run raise `RegistryError` until `open_run` has returned."""
        registry = self.open_registry()
        with pytest.raises(RegistryError):
            registry.registered()
        with pytest.raises(RegistryError):
            registry.log_metrics(rows_of("loss", [1.0]))

    @pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
    def test_status_is_kept_and_reopened(self, status: RunStatus) -> None:
        """A run gets the status of its end, and is running again in the next attempt."""
        description = example_description()
        registry, run_id = self.opened(description)
        assert self.status(run_id) == "running"
        registry.end_run(status)
        registry.end_run(status)
        assert self.status(run_id) == status
        _, reopened = self.opened(description)
        assert reopened == run_id
        assert self.status(run_id) == "running"

    def test_hyperparameters_may_be_anything(self) -> None:
        """Long, oddly named, empty and many hyperparameters raise nothing, and neither does
        changing them in a later attempt.
        """
        odd = {"x" * 400: 1, "a//b": None, "../up": True, "": "empty", "long": "y" * 9000}
        many = {f"layers.{n}.width": n for n in range(150)}
        description = example_description(hyperparameters={**odd, **many, "lr": 0.1})
        self.opened(description)
        changed = {**odd, **many, "lr": 0.01, "long": "z" * 9000, "new": ""}
        later = example_description(uid=description.uid, hyperparameters=changed)
        self.opened(later)
        self.opened(later)

    def test_rows_come_back(self) -> None:
        """Rows are returned exactly: value, step and time, non-finite values too."""
        registry, _ = self.opened(example_description())
        rows = rows_of("loss", [0.1, math.inf, -math.inf, 1e-300, -0.5])
        registry.log_metrics(rows)
        assert sorted(registry.history("loss", 0), key=lambda row: row.step) == rows
        registry.log_metrics(rows_of("bad", [math.nan]))
        (row,) = registry.history("bad", 0)
        assert math.isnan(row.value)

    def test_same_row_does_not_double(self) -> None:
        """Rows sent again, alone or among new ones, by any process, stay one each."""
        description = example_description()
        registry, run_id = self.opened(description)
        rows = [*rows_of("loss", [3.0, math.nan, 1.0]), *rows_of("acc", [0.5, 0.6])]
        registry.log_metrics(rows)
        registry.log_metrics(rows[:2])
        other, _ = self.opened(description)
        other.log_metrics([*rows, *rows_of("loss", [0.5], first_step=4)])
        assert [step for step, _ in self.rows(run_id, "loss")] == [1, 2, 3, 4]
        assert self.rows(run_id, "acc") == [(1, 0.5), (2, 0.6)]

    def test_any_number_of_rows(self) -> None:
        """No rows at all are accepted, and more than one request of a backend takes."""
        registry, run_id = self.opened(example_description())
        registry.log_metrics([])
        registry.log_metrics(rows_of("loss", [float(n) for n in range(2500)]))
        assert len(self.rows(run_id, "loss")) == 2500
        assert len(registry.history("loss", 2000)) == 500

    def test_high_water_is_the_highest_step_of_each_metric(self) -> None:
        """`high_water` tells each metric's highest step, whatever order rows came in."""
        description = example_description()
        registry, _ = self.opened(description)
        assert registry.high_water() == {}
        registry.log_metrics([*rows_of("loss", [1, 1], first_step=9), *rows_of("loss", [1])])
        registry.log_metrics(rows_of("val/acc", [0.5], first_step=5))
        other, _ = self.opened(description)
        assert other.high_water() == {"loss": 10, "val/acc": 5}

    def test_history_begins_after_a_step(self) -> None:
        """`history` leaves out rows up to the given step, and knows no other metric's."""
        registry, _ = self.opened(example_description())
        registry.log_metrics([*rows_of("loss", [1, 2, 3, 4]), *rows_of("acc", [9, 9, 9, 9])])
        assert sorted(row.step for row in registry.history("loss", 2)) == [3, 4]
        assert registry.history("never logged", 0) == []

    def test_history_of_a_range(self) -> None:
        """`history` up to a step returns every row of the range and no other, of a long history
        and under a name that the backend refuses, too; values come back exactly.
        """
        registry, _ = self.opened(example_description())
        values = [1 / step for step in range(1, 4001)]
        registry.log_metrics([*rows_of("loss", values), *rows_of(_ODD_KEY, [math.inf, math.nan])])
        found = sorted(registry.history("loss", 100, 3700), key=lambda row: row.step)
        assert [(row.step, row.value) for row in found] == [
            (step, 1 / step) for step in range(101, 3701)
        ]
        assert [row.step for row in registry.history("loss", 3998, 9000)] == [3999, 4000]
        infinite, nan = sorted(registry.history(_ODD_KEY, 0, 2), key=lambda row: row.step)
        assert infinite.value == math.inf
        assert math.isnan(nan.value)
        assert registry.history("loss", 4000, 5000) == []
        assert registry.history("never logged", 0, 10) == []

    def test_any_metric_name(self) -> None:
        """A name that the backend refuses comes back as it was given, and never meets another."""
        description = example_description()
        registry, _ = self.opened(description)
        keys = [_ODD_KEY, _ODD_KEY.replace("(", "["), "x" * 300, "../up", "loss"]
        for value, key in enumerate(keys):
            registry.log_metrics(rows_of(key, [float(value)], first_step=value + 1))
        other, _ = self.opened(description)
        assert other.high_water() == {key: step for step, key in enumerate(keys, 1)}
        for value, key in enumerate(keys):
            (row,) = other.history(key, 0)
            assert (row.key, row.value) == (key, float(value))

    def test_checkpoint_is_registered(self) -> None:
        """A registered checkpoint is listed for its run, by every process."""
        description = example_description()
        registry, run_id = self.opened(description)
        assert registry.registered() == {}
        record = example_record(description, 100)
        registration = self.register(registry, record)
        assert (registration.checkpoint, registration.run_id) == (record.id, run_id)
        assert registry.registered() == {record.id: registration}
        other, _ = self.opened(description)
        assert other.registered() == {record.id: registration}

    def test_checkpoint_is_registered_once(self) -> None:
        """Registering again, here or from another process, returns the same registration."""
        description = example_description()
        registry, run_id = self.opened(description)
        record = example_record(description, 100)
        first = self.register(registry, record)
        other, _ = self.opened(description)
        assert self.register(registry, record) == self.register(other, record) == first
        assert self.checkpoints(run_id) == [record.id]

    def test_checkpoints_of_one_step_are_two(self) -> None:
        """Two attempts that saved at one step have two checkpoints."""
        description = example_description()
        registry, run_id = self.opened(description)
        first = example_record(description, 100)
        second = example_record(
            description,
            100,
            id="step-00000100-a2-s1",
            lineage=[LineageEntry(attempt=2, resumed_from=None)],
        )
        assert self.register(registry, first) != self.register(registry, second)
        assert self.checkpoints(run_id) == [first.id, second.id]

    def test_runs_do_not_share_checkpoints(self) -> None:
        """`registered` lists the open run's checkpoints only."""
        one, other = example_description(), example_description()
        first, _ = self.opened(one)
        second, _ = self.opened(other)
        self.register(first, example_record(one, 100))
        assert second.registered() == {}

    def test_registering_adds_no_row(self) -> None:
        """A checkpoint's metrics are those of the run: no step gets a second row, and no
        metric's high-water mark rises before its rows were sent.
        """
        description = example_description()
        registry, run_id = self.opened(description)
        registry.log_metrics(rows_of("loss", [3.0, 2.0, 1.0]))
        metrics = {"loss": 2.0, "acc": 0.5, "bad": "nan"}
        self.register(registry, example_record(description, 2, metrics=metrics))
        later, _ = self.opened(description)
        self.register(later, example_record(description, 3, metrics={"loss": 1.0, "acc": 0.5}))
        assert self.rows(run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
        assert later.high_water() == {"loss": 3}

    def test_alias_moves(self) -> None:
        """An alias points at the version it was set to last; setting it again is no error."""
        description = example_description()
        registry, _ = self.opened(description)
        first = self.register(registry, example_record(description, 100))
        second = self.register(registry, example_record(description, 200))
        alias = f"resume-{description.uid}"
        for registration in (first, first, second, second):
            registry.set_alias(alias, registration)
            assert self.alias(alias) == registration.version

    def test_alias_tells_what_it_points_at(self) -> None:
        """Any process, also of another run, learns the checkpoint under an alias, its run, and
        its value of a metric; of a metric that it lacks, None; of an alias that is free, None.
        """
        description = example_description()
        registry, run_id = self.opened(description)
        alias = f"best {description.uid}"
        assert registry.alias_holder(alias, "loss") is None
        registry.log_metrics(rows_of("loss", [0.25], first_step=100))
        record = example_record(description, 100, metrics={"loss": 0.25})
        registry.set_alias(alias, self.register(registry, record))
        other, _ = self.opened(example_description())
        for reader in (registry, other):
            assert reader.alias_holder(alias, "loss") == AliasHolder(
                run_id=run_id, checkpoint=record.id, value=0.25
            )
            held = reader.alias_holder(alias, "accuracy")
            assert held is not None
            assert held.value is None

    def test_best_is_never_taken_by_a_worse_run(self) -> None:
        """The alias is one for all runs: it moves to another run's checkpoint only where that is
        better, whether the run began before or after; equal ones leave it.
        """
        metric = f"loss-{uuid.uuid4().hex[:6]}"  # the alias may stand from another test
        config = RegistryConfig(best=f"{metric}:min")
        pointed = []
        for value in (1.0, 9.0, 1.0, 0.5, 0.7):
            description = example_description()
            registry, run_id = self.opened(description)
            registry.log_metrics(rows_of(metric, [value], first_step=100))
            record = example_record(description, 100, metrics={metric: value})
            registration = self.register(registry, record)
            best = BestAlias(registry, config, run_id=run_id, attempt=1)
            assert best.consider(record)
            due = best.due()
            if due is not None:
                registry.set_alias(BEST, due)
            pointed.append(self.alias(BEST) == registration.version)
        assert pointed == [True, False, False, True, False]

    def test_what_an_alias_points_at_is_held(self) -> None:
        """With the alias's name; and it is not forgotten before the alias has moved on."""
        description = example_description()
        registry, _ = self.opened(description)
        first, second = (example_record(description, step) for step in (100, 200))
        alias = f"resume-{description.uid}"
        registry.set_alias(alias, self.register(registry, first))
        registry.set_alias(f"mine-{description.uid}", self.register(registry, second))
        other, _ = self.opened(example_description())
        assert other.held() == {}
        held = registry.held()
        assert set(held) == {first.id, second.id}
        assert alias in held[first.id][0]
        with pytest.raises(RegistryRefusedError, match=alias):
            registry.forget(first.id)
        assert set(registry.registered()) == {first.id, second.id}
        registry.set_alias(alias, registry.registered()[second.id])
        assert set(registry.held()) == {second.id}

    def test_what_is_forgotten_is_gone(self) -> None:
        """Also half of a registration, and again; the run, its metrics and the others stay."""
        description = example_description()
        registry, run_id = self.opened(description)
        registry.log_metrics(rows_of("loss", [3.0], first_step=100))
        records = [example_record(description, step) for step in (100, 200)]
        for record in records:
            self.register(registry, record)
        for _ in range(2):
            registry.forget(records[0].id)
        registry.forget("step-00000300-a1-s3")  # never registered
        assert set(registry.registered()) == {records[1].id}
        assert self.rows(run_id, "loss") == [(100, 3.0)]
        again = self.register(registry, records[0])
        assert registry.registered()[records[0].id] == again

    def test_what_is_gone_is_forgotten_with_its_aliases(self) -> None:
        """Aliases first; what other checkpoints have stays, and there is no trace of it left."""
        description = example_description()
        registry, run_id = self.opened(description)
        records = [example_record(description, step) for step in (100, 200)]
        registrations = [self.register(registry, record) for record in records]
        aliases = [f"{name}-{description.uid}" for name in ("resume", "mine", "kept")]
        for alias, number in zip(aliases, (0, 0, 1), strict=True):
            registry.set_alias(alias, registrations[number])
        assert registry.traces() == {record.id: 0 for record in records}
        for _ in range(2):
            registry.forget(records[0].id, aliases=True)
        assert registry.traces() == {records[1].id: 0}
        assert self.checkpoints(run_id) == [records[1].id]
        assert [self.alias(alias) for alias in aliases] == [None, None, registrations[1].version]

    @pytest.mark.parametrize("alias", ["resume-a b/ü@1", "latest", "v12", "x" * 400])
    def test_any_alias(self, alias: str) -> None:
        """A name that the backend refuses as an alias is changed, never an error."""
        description = example_description()
        registry, _ = self.opened(description)
        registry.set_alias(alias, self.register(registry, example_record(description, 100)))

    def test_note_is_replaced(self) -> None:
        """The run's description holds the last text, once, however long."""
        registry, run_id = self.opened(example_description())
        registry.write_note("the first story")
        registry.write_note("the second story")
        registry.write_note("the second story")
        assert self.note(run_id).count("story") == 1
        assert "the second story" in self.note(run_id)
        registry.write_note("a long story\n" * 3000)
        assert "a long story" in self.note(run_id)

    def test_tag_is_replaced(self) -> None:
        """A tag holds the last text, be that too long for the backend."""
        registry, run_id = self.opened(example_description())
        registry.write_tag("replay", "identical")
        registry.write_tag("replay", "diverged: " + "x" * 20_000)
        assert str(self.tag(run_id, "replay")).startswith("diverged: xxx")

    def test_links_are_urls(self) -> None:
        """Links have known names and are URLs; a checkpoint's only with a registration."""
        description = example_description()
        registry, _ = self.opened(description)
        registration = self.register(registry, example_record(description, 100))
        assert set(registry.links(None)) <= {"run"}
        links = registry.links(registration)
        assert set(links) in (set(), {"run", "model", "version"})
        assert all("://" in link for link in links.values())
