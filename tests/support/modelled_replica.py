"""A replica of a modelled run in a second store: what a copy brings, and what adopting it gives."""

from __future__ import annotations

import dataclasses

import pytest
from support.made_runs import claim_request, memory_store
from support.modelled_run import ModelledRun, load_tensors
from support.modelled_trainer import Cut, age_of, arm
from support.run_model import Age, Lost

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.errors import CheckpointNotFoundError, StoreError
from ckpt_tasks.fencing import claim_attempt
from ckpt_tasks.recovery.recover import recover
from ckpt_tasks.replica import adopt, copy
from ckpt_tasks.testing import FaultyStore


class ModelledReplica:
    """A replica: `ages` of the checkpoints that it has."""

    def __init__(self, modelled: ModelledRun) -> None:
        self.modelled = modelled
        self.store = memory_store()
        self.ages: set[Age] = set()
        self.starts: dict[int, Age | None] = {}

    def copy(self, cut: Cut | None = None) -> None:
        """Bring all that is kept; killed on the way, no more than that. What is damaged comes only
        where the replica had the right bytes already.
        """
        m, model = self.modelled, self.modelled.model
        wanted = {age for age in model.committed - model.quarantined if not model.is_given_up(age)}
        wanted -= self.ages
        damaged = {age for age in wanted if model.is_damaged(age)}
        target = FaultyStore(self.store)
        struck_at = arm(target, cut)
        before, self.starts = self.ages, dict(model.starts)
        try:
            report = copy(m.store, target, m.run.name)
        except StoreError:
            assert target.count >= struck_at
            self.ages = self.found()
        else:
            self.ages = self.found()
            assert wanted - self.ages == {age_of(one.checkpoint) for one in report.damaged}
            assert wanted - self.ages <= damaged
        assert before <= self.ages <= before | wanted
        self.check()

    def found(self) -> set[Age]:
        return set(map(age_of, list_checkpoints(self.store, self.modelled.layout)))

    def check(self) -> None:
        """Each loads from there as it was saved, be the source as it may."""
        for age in self.ages:
            found = load_tensors(self.store, self.modelled, age)
            assert found == self.modelled.model.writes[age].tensors, f"{age} was copied wrongly"

    def adopt(self) -> None:
        """It becomes a run of its own, which goes on from the newest that it has."""
        m = self.modelled
        if not self.ages:
            return
        self.copy()
        adopted = adopt(self.store, m.run.name)
        model = dataclasses.replace(
            m.model,
            committed=set(self.ages),
            data=dict.fromkeys(
                (path for age in self.ages for path in m.model.needs(age)), m.model.now
            ),
            starts=self.starts,
            damaged=set(),
            quarantined=set(),
            expired={},
            collecting={},
        )
        attempt = claim_attempt(
            self.store, m.layout, adopted, claim_request(without_commit=10**9, takeover=True)
        )
        try:
            resumed = recover(self.store, m.layout, adopted, attempt).resumed.checkpoint
        except CheckpointNotFoundError:
            with pytest.raises(Lost):
                model.pick()
        else:
            assert (age_of(resumed) if resumed is not None else None, []) == model.pick()
        self.check()
