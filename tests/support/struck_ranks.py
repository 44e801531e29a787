"""A training on two ranks, of which one is struck, as a trial of `ckpt_tasks.testing.sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from support.attempt_forks import AttemptForks
from support.faulty_attempt import StoreFault
from support.ranked_forks import RankedFork, start_ranks
from support.struck_runs import Place, Scenario, Sweeps, ToyTrial
from support.toy_runs import toy_spec

from ckpt_tasks.checkpointer.catalog import list_checkpoints
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.config import SaveConfig, ScheduleConfig
from ckpt_tasks.events import SaveFailed
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.testing import Fault
from ckpt_tasks.testing.sweep import Struck
from ckpt_tasks.testing.wrappers import OPERATIONS
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE

RANKS, STEPS, EVERY = 2, 12, 5
_INLINE, _BESIDE = SaveConfig(asynchronous=False), SaveConfig()


class RankedScenario(Scenario, frozen=True, kw_only=True):
    """What is struck of several ranks.

    Parameters
    ----------
    rank
        The one that is.
    sharding
        Of `toy_ranks`.
    """

    rank: int
    sharding: str
    steps: int = STEPS


RANKED_SCENARIOS: dict[str, RankedScenario] = {
    scenario.name: scenario
    for scenario in (
        RankedScenario(name="rank0", rank=0, sharding="fsdp"),
        RankedScenario(name="rank1", rank=1, sharding="fsdp"),
        RankedScenario(name="rank0-resume", rank=0, sharding="ddp", killed_at=7),
        RankedScenario(name="rank1-resume", rank=1, sharding="ddp", killed_at=7),
        RankedScenario(
            name="rank0-writer", rank=0, sharding="fsdp", writer=True, operations=OPERATIONS
        ),
        RankedScenario(
            name="rank1-writer", rank=1, sharding="fsdp", writer=True, operations=OPERATIONS
        ),
    )
}


class RankedSweeps(Sweeps):
    """As `Sweeps`, of a training on several ranks."""

    def __init__(self, forks: AttemptForks, place: Place, scenario: RankedScenario) -> None:
        super().__init__(forks, place, scenario)

    def trial(self) -> RankedTrial:
        return RankedTrial(self)


class RankedTrial(ToyTrial):
    """One run."""

    _scenario: RankedScenario

    def strike(self, fault: Fault) -> Struck:
        self._begin()
        ranks = self._start(fault)
        if fault.how == "stall":
            struck = self._replace(ranks, fault)  # type: ignore[arg-type]
            return msgspec.structs.replace(struck, problems=_hangs(ranks))
        met = ranks.wait().met
        if met is None:
            return Struck(reached=False, failed=False)
        self._saves_failed = bool(ranks.events_of(SaveFailed))
        ended = ranks.outcome.code == EXIT_DONE
        can_tell = ended and fault.how != "kill"  # a writer that was killed clears nothing away
        of_write = self._problems_of_write(*met) if can_tell else []
        return Struck(reached=True, failed=not ended, problems=[*_hangs(ranks), *of_write])

    def check(self) -> Sequence[str]:
        return [*super().check(), *self._parts_missing()]

    def _parts_missing(self) -> list[str]:
        """Each rank has its part in every checkpoint. That it is whole is checked elsewhere."""
        layout = RunLayout(self._spec.run)
        with open_store(self._spec.config.store) as store:
            records = [read_commit(store, layout, c) for c in list_checkpoints(store, layout)]
        return [
            f"{record.id} has parts of ranks {[ref.rank for ref in record.indexes]}"
            for record in records
            if [ref.rank for ref in record.indexes] != list(range(RANKS))
        ]

    def _make_spec(self) -> TrainSpec:
        spec = super()._make_spec()
        config = msgspec.structs.replace(
            spec.config,
            schedule=ScheduleConfig(every_steps=EVERY),
            save=_INLINE,
        )
        return toy_spec(
            spec.config.store.url,
            entrypoint=f"support.toy_ranks:{self._scenario.sharding}",
            params={"epochs": 1},
            nproc=RANKS,
            config=config,
        )

    def _begin(self) -> None:
        if self._scenario.killed_at is None:
            return
        order = self._folder / "kill"
        order.write_text(str(self._scenario.killed_at), "ascii")
        ranks = start_ranks(
            self._forks, self._spec, environment={**self._environment(), "TOY_KILL": str(order)}
        )
        assert ranks.wait().outcome.code != EXIT_DONE
        assert not order.exists()

    def _start(  # type: ignore[override] # it is used as a `Fork` is
        self, fault: Fault | None = None, *, counted: bool = False, ages: bool = True, **_: Any
    ) -> RankedFork:
        faults = [] if fault is None else [StoreFault(at=fault.at, when=fault.when, how=fault.how)]
        is_counted = counted or fault is not None
        has_writer = self._scenario.writer and is_counted
        config = msgspec.structs.replace(self._spec.config, save=_BESIDE if has_writer else _INLINE)
        return start_ranks(
            self._forks,
            msgspec.structs.replace(self._spec, config=config),
            environment=self._environment(),
            struck=self._scenario.rank,
            faults=faults,
            counted=sorted(self._scenario.operations) if is_counted else [],
            ages=ages,
            has_writer=has_writer,
        )

    def _environment(self) -> dict[str, str]:
        server = self._place.server
        of_store = server.environment if server is not None else {}
        return {**self._digest.environment, "TOY_SETTLE": "1", **of_store}


def _hangs(ranks: RankedFork) -> list[str]:
    return [f"the struck attempt hung: {ranks.hung}"] if ranks.hung else []


def sweeps_of(
    forks: AttemptForks, place: Place, scenario: Scenario, database: Path | None = None
) -> Sweeps:
    """The sweeps of any scenario."""
    if isinstance(scenario, RankedScenario):
        return RankedSweeps(forks, place, scenario)
    return Sweeps(forks, place, scenario, database)
