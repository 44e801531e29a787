"""A run, and all that may happen to it in any order, beside a plain model of it.

Hypothesis draws what happens: attempts claim, save, are killed and wake up; people pin, expire,
name and collect; bytes go bad, the registry loses what it knew. After each step the listing of the
store and the contents of the registry are compared with the model (`support.run_model`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.made_runs import elsewhere
from support.modelled_replica import ModelledReplica
from support.modelled_run import ModelledRun, WatchedRegistry
from support.modelled_trainer import FOR_EVER, Cut, Trainer
from support.modelled_upkeep import Upkeep
from support.retained_runs import GRACE
from support.run_model import Age

from ckpt_tasks.checkpointer import catalog, marks
from ckpt_tasks.fencing import attempts, claim, heartbeat
from ckpt_tasks.retention import references
from ckpt_tasks.store.ambiguity import create_once

EXAMPLES = os.environ.get("CKPT_TASKS_FUZZ_EXAMPLES")
"""How many histories are tried; ``make fuzz`` tries many."""


def cuts(last: int) -> st.SearchStrategy[Cut | None]:
    """None, or one of the operations until the `last` fails."""
    return st.none() | st.builds(
        Cut,
        at=st.integers(1, last),
        after=st.booleans(),
        times=st.sampled_from([FOR_EVER, 1, 7]),
        torn=st.booleans(),
    )


CUTS = cuts(8)
LATE_CUTS = cuts(16)
"""A collection that finds something to remove gets so far."""

ANY = st.integers(0, 30)
"""Picks one of what there is, modulo how many."""

FEW = st.integers(0, 2)


class Machine(RuleBasedStateMachine):
    """Each rule does something to the real run and to the model, and compares the outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.modelled = ModelledRun()
        self.model = self.modelled.model
        self.upkeep = Upkeep(self.modelled)
        self.replica = ModelledReplica(self.modelled)
        self._patch = pytest.MonkeyPatch()
        module = importlib.import_module("ckpt_tasks.tasks.reconcile")
        modelled, store = self.modelled, self.modelled.store
        self._patch.setattr(module, "load_registry", lambda config: WatchedRegistry(modelled))
        self._patch.setattr(module, "open_existing_store", lambda config: store)

    def trainer(self, pick: int) -> Trainer:
        trainers = self.modelled.trainers
        return trainers[-1 - pick % len(trainers)]

    def age(self, pick: int) -> Age:
        return sorted(self.model.committed)[-1 - pick % len(self.model.committed)]

    def stale(self) -> list[Trainer]:
        return [one for one in self.modelled.trainers if self.modelled.is_stale(one)]

    def of_the_owner(self) -> list[Age]:
        """Checkpoints of the newest attempt, while it lives."""
        living = [one.number for one in self.modelled.trainers]
        return [a for a in self.model.committed if a[0] == self.model.attempts and a[0] in living]

    # -- attempts ----------------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        self.modelled.begin()

    @rule(cut=CUTS)
    def retry(self, cut: Cut | None) -> None:
        self.modelled.begin(cut=cut)

    @precondition(lambda self: self.model.committed)
    @rule(pick=ANY, fresh=st.booleans(), cut=CUTS)
    def resume_as_asked(self, pick: int, fresh: bool, cut: Cut | None) -> None:
        resume = "fresh" if fresh else str(self.modelled.id_of(self.age(pick)))
        self.modelled.begin(resume, cut)

    @precondition(lambda self: self.modelled.trainers)
    @rule(pick=FEW, body=FEW, rows=st.tuples(FEW, FEW), loss=FEW, odd=FEW)
    def save(self, pick: int, body: int, rows: tuple[int, int], loss: int, odd: int) -> None:
        trainer = self.trainer(pick)
        self.modelled.save(trainer, body=body, rows=rows, loss=loss, healthy=odd != 2)

    @precondition(lambda self: self.modelled.trainers)
    @rule(losses=st.lists(FEW, min_size=1, max_size=3))
    def train(self, losses: list[int]) -> None:
        """The newest attempt saves, and its registrar publishes: what happens most."""
        trainer = self.trainer(0)
        for loss in losses:
            if trainer in self.modelled.trainers:
                self.modelled.save(trainer, loss=loss)
        if trainer in self.modelled.trainers:
            self.upkeep.publish(trainer)

    @precondition(lambda self: self.modelled.trainers)
    @rule(pick=FEW, body=FEW, cut=CUTS)
    def save_and_fail(self, pick: int, body: int, cut: Cut | None) -> None:
        self.modelled.save(self.trainer(pick), body=body, cut=cut)

    @precondition(lambda self: self.modelled.trainers)
    @rule(body=FEW, names=st.lists(st.sampled_from(["begin", "retain", "wait"]), max_size=4))
    def save_while(self, body: int, names: list[str]) -> None:
        """Right before its commit record another attempt begins, or a collection comes."""
        budget = iter((0.4,))

        def retain() -> None:
            self.upkeep.expire(1)
            self.upkeep.collect()

        def wait() -> None:
            self.upkeep.advance(next(budget, 0.0) * GRACE)

        actions: dict[str, Callable[[], None]] = {
            "begin": self.modelled.begin, "retain": retain, "wait": wait,
        }  # fmt: skip

        def during() -> None:
            for name in names:
                actions[name]()

        self.modelled.save(self.trainer(0), body=body, during=during)

    @precondition(lambda self: self.modelled.trainers)
    @rule(pick=FEW, body=FEW)
    def save_late(self, pick: int, body: int) -> None:
        """The commit record is on its way when the attempt is told that it failed."""
        self.modelled.save(self.trainer(pick), body=body, lands_late=True)

    @precondition(lambda self: self.modelled.late)
    @rule()
    def land(self) -> None:
        self.modelled.land()

    @precondition(lambda self: self.modelled.trainers)
    @rule(pick=FEW)
    def kill(self, pick: int) -> None:
        self.modelled.kill(self.trainer(pick))

    @precondition(lambda self: self.stale())
    @rule(deed=st.sampled_from(["save", "publish", "expire", "collect"]))
    def stale_one_wakes(self, deed: str) -> None:
        """It has slept while it was replaced: whatever it does now, nothing comes of it."""
        trainer = self.stale()[-1]
        if deed == "save":
            self.modelled.save(trainer)
        elif deed == "publish":
            self.upkeep.publish(trainer)
        elif deed == "expire":
            self.upkeep.expire(1, trainer)
        else:
            self.upkeep.collect(trainer)

    @precondition(lambda self: self.of_the_owner())
    @rule()
    def complete(self) -> None:
        self.upkeep.complete(self.modelled.trainers[-1], max(self.of_the_owner()))

    # -- retention ---------------------------------------------------------------------------------

    @precondition(lambda self: self.model.committed)
    @rule(pick=ANY)
    def pin(self, pick: int) -> None:
        self.upkeep.pin(self.age(pick))

    @precondition(lambda self: self.model.pins)
    @rule(pick=ANY)
    def unpin(self, pick: int) -> None:
        pins = sorted(self.model.pins)
        self.upkeep.unpin(pins[pick % len(pins)])

    @precondition(lambda self: self.model.committed)
    @rule(pick=ANY)
    def expire_one(self, pick: int) -> None:
        self.upkeep.expire_one(self.age(pick))

    @rule(latest=st.integers(1, 3), pick=st.none() | FEW)
    def expire(self, latest: int, pick: int | None) -> None:
        in_name_of = pick is not None and self.modelled.trainers
        self.upkeep.expire(latest, self.trainer(pick) if in_name_of else None)

    @rule(pick=st.none() | FEW, cut=CUTS)
    def collect(self, pick: int | None, cut: Cut | None) -> None:
        in_name_of = pick is not None and self.modelled.trainers
        self.upkeep.collect(self.trainer(pick) if in_name_of else None, cut)

    @rule(graces=st.sampled_from([0.4, 2.5]), odd=FEW)
    def wait(self, graces: float, odd: int) -> None:
        self.time_passes(graces, beats=odd != 2)

    def time_passes(self, graces: float, *, beats: bool) -> None:
        self.upkeep.advance(graces * GRACE)
        for trainer in self.modelled.trainers if beats else ():
            self.modelled.beat(trainer)

    @rule(latest=st.integers(1, 3), odd=FEW, cut=LATE_CUTS)
    def retain(self, latest: int, odd: int, cut: Cut | None) -> None:
        self.upkeep.expire(latest)
        self.time_passes(2.5, beats=odd != 2)
        self.upkeep.collect(cut=cut)

    # -- damage ------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.committed)
    @rule(pick=st.integers(0, 4), file=ANY, place=st.floats(0, 1))
    def damage(self, pick: int, file: int, place: float) -> None:
        paths = sorted(self.model.needs(self.age(pick)) & self.model.data.keys())
        if paths:
            self.upkeep.damage(paths[file % len(paths)], place)

    @precondition(lambda self: self.model.damaged)
    @rule()
    def repair(self) -> None:
        self.upkeep.repair()

    @precondition(lambda self: self.model.committed)
    @rule(pick=ANY)
    def verify(self, pick: int) -> None:
        self.upkeep.verify(self.age(pick))

    @rule(cut=CUTS)
    def copy(self, cut: Cut | None) -> None:
        self.replica.copy(cut)

    # -- registry ----------------------------------------------------------------------------------

    @precondition(lambda self: self.modelled.trainers)
    @rule(pick=FEW)
    def publish(self, pick: int) -> None:
        self.upkeep.publish(self.trainer(pick))

    @rule()
    def reconcile(self) -> None:
        self.upkeep.reconcile()

    @rule(odd=FEW)
    def registry_comes_or_goes(self, odd: int) -> None:
        self.modelled.memory.available = odd != 2

    @precondition(lambda self: self.model.registered)
    @rule()
    def empty_registry(self) -> None:
        self.upkeep.empty_registry()

    @precondition(lambda self: self.model.registered and self.modelled.memory.available)
    @rule(pick=ANY, deletes=st.booleans(), reconciles=st.booleans())
    def meddle(self, pick: int, deletes: bool, reconciles: bool) -> None:
        """Somebody deletes a version, or gives it an alias; and lets it be put right."""
        registered = sorted(self.model.registered)
        age = registered[pick % len(registered)]
        (self.upkeep.lose_registration if deletes else self.upkeep.set_alias)(age)
        if reconciles:
            self.upkeep.reconcile()

    # -- comparing ---------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.modelled.check()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else what has failed says more
                self.settle()
        finally:
            self._patch.undo()
            for trainer in list(self.modelled.trainers):
                self.modelled.kill(trainer)
            for store in (self.modelled.store.store, self.replica.store):
                for info in store.list_objects(""):
                    store.delete(info.path)

    def settle(self) -> None:
        """All that is on its way comes to its end: what is kept is whole, and nothing else is."""
        modelled, upkeep = self.modelled, self.upkeep
        modelled.memory.available = True
        modelled.land()
        modelled.check_contents()
        self.replica.check()
        self.replica.adopt()
        upkeep.reconcile()
        modelled.check()
        for _ in range(2):
            upkeep.advance(2.5 * GRACE)
            upkeep.collect()
            modelled.check()
        modelled.check_contents()


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, few threads; every attempt is a process of a machine that cannot be looked at."""
    monkeypatch.setitem(create_once.__kwdefaults__, "sleep", lambda seconds: None)
    monkeypatch.setattr(claim, "this_process", elsewhere)
    monkeypatch.setattr(marks, "this_uptime", lambda: None)
    monkeypatch.setattr(heartbeat, "this_uptime", lambda: None)
    for module in (attempts, catalog, references):
        monkeypatch.setattr(module, "_PARALLEL_READS", 1)


@pytest.mark.timeout(7200)  # a failure takes minutes to be made short
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("examples", "same_each_time"),
    [
        pytest.param(90, True, id="a sample"),
        pytest.param(
            int(EXAMPLES or 1000),
            False,
            id="many",
            marks=() if EXAMPLES else pytest.mark.exhaustive,
        ),
    ],
)
def test_a_run_is_what_the_model_says_whatever_happens(examples: int, same_each_time: bool) -> None:
    """Drawn histories of up to fifty steps."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize=same_each_time,
            # What fails each time can be made short by `make fuzz`, in its minutes.
            phases=[Phase.generate] if same_each_time else list(Phase),
            suppress_health_check=list(HealthCheck),
        ),
    )
