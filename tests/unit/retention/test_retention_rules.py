"""Every rule against a plain model, and what no configuration may ever let go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tasks.checkpointer.catalog import CheckpointView, RunView, Standing
from ckpt_tasks.config import RetentionConfig
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.format.records import (
    CommitRecord,
    LineageEntry,
    ResumedRecord,
    RunRecord,
)
from ckpt_tasks.retention.plan import RetentionPlan, plan
from ckpt_tasks.types import CheckpointId, Position

NOW = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)


def record_of(
    number: int, *, age: float = 0.0, epoch: int = 0, attempt: int = 1, loss: float | str = 1.0
) -> CommitRecord:
    """A checkpoint after `number` saves of ten steps each, so many seconds old."""
    checkpoint = CheckpointId(number * 10, attempt, number)
    return CommitRecord(
        uid="0" * 32,
        id=str(checkpoint),
        write_id=f"a{attempt:04d}-s{number:04d}-0",
        position=Position(epoch=epoch, step=number * 10, phase="epoch_done"),
        lineage=[LineageEntry(attempt=attempt, resumed_from=None)],
        hyperparameters={},
        metrics={"loss": loss},  # type: ignore[dict-item] - a number, or a number as text
        trigger="epoch",
        reason="every epoch",
        timings={},
        environment={},
        world_size=1,
        size=100,
        indexes=[],
        created_at=(NOW - timedelta(seconds=age)).isoformat(),
    )


def view_of(
    records: Sequence[CommitRecord],
    standings: Sequence[Standing] = (),
    *,
    pins: Sequence[int] = (),
    trained: int = 1,
) -> RunView:
    """A run with checkpoints, oldest first; `trained` is its newest attempt that has resumed."""
    views = [
        CheckpointView(
            id=record.id,
            standing=standings[i] if standings else "valid",
            why="a test",
            record=record,
            pinned=i in pins,
            pin="kept by a test" if i in pins else None,
        )
        for i, record in enumerate(records)
    ]
    resumed = ResumedRecord(
        attempt=trained, checkpoint=None, lineage=[], why="a test", resumed_at="now"
    )
    return RunView(
        run=RunRecord(uid="0" * 32, run="digits", created_at="now", created_by="a test"),
        attempts=[AttemptView(number=trained, claim=None, resumed=resumed)],
        checkpoints=views[::-1],
        completed=None,
    )


def planned(view: RunView, **config: object) -> RetentionPlan:
    return plan(view, RetentionConfig(**config), now=NOW, held={})  # type: ignore[arg-type]


def steps(ids: Sequence[str]) -> list[int]:
    return sorted(CheckpointId.parse(one).step for one in ids)


COUNTS = st.integers(1, 12)


@given(count=COUNTS, total=st.integers(0, 12))
def test_latest_keeps_the_newest(count: int, total: int) -> None:
    """As many as asked for, or all there are."""
    records = [record_of(n) for n in range(1, total + 1)]
    kept = planned(view_of(records), latest=count).keeps
    assert steps(kept) == [n * 10 for n in range(1, total + 1)][-count:]


@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, "nan", "-inf"]), min_size=1, max_size=9),
    count=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
)
def test_best_keeps_the_best(losses: list[float | str], count: int, mode: str) -> None:
    """By finite values; of equal ones the earlier; all, where nothing tells which is best."""
    records = [record_of(n, loss=loss) for n, loss in enumerate(losses, start=1)]
    kept = planned(view_of(records), best=[f"{count}:loss:{mode}"]).keeps
    sign = 1 if mode == "min" else -1
    finite = [(sign * float(x), n * 10) for n, x in enumerate(losses, 1) if math.isfinite(float(x))]
    every = [n * 10 for n in range(1, len(losses) + 1)]
    best = [step for _, step in sorted(finite)[:count]] if finite else every
    assert steps(kept) == sorted({*best, len(losses) * 10})


@given(
    places=st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=10).map(sorted),
    count=st.integers(1, 9),
)
def test_every_n_epochs_keeps_the_first_of_each(places: list[int], count: int) -> None:
    """The first at or after each multiple stays, whatever comes later."""
    records = [record_of(n, epoch=epoch) for n, epoch in enumerate(places, start=1)]
    kept = steps(planned(view_of(records), every_epochs=count).keeps)
    wanted = {len(places) * 10}
    for multiple in range(count, 40, count):
        behind = [n * 10 for n, e in enumerate(places, 1) if multiple <= e + 1 < multiple + count]
        wanted |= set(behind[:1])
    assert kept == sorted(wanted)


def test_every_n_steps_goes_by_steps() -> None:
    """Also where no save lies right on a multiple."""
    records = [record_of(n) for n in (1, 2, 3, 5, 9)]
    plan_of = planned(view_of(records), every_steps=25)
    assert steps(plan_of.keeps) == [30, 50, 90]
    assert plan_of.verdicts[-3].why == ["first at or after 25 steps"]


def test_buckets_thin_out_the_past() -> None:
    """All of the last hour, hourly for a day, daily for a month, and nothing beyond but the rest
    of the rules.
    """
    hour, day = 3600, 86400
    ages = [40 * day, 20 * day + hour, 20 * day, 5 * hour + 60, 5 * hour, 2 * hour, 600, 60]
    records = [record_of(n, age=age) for n, age in enumerate(ages, start=1)]
    kept = planned(view_of(records), buckets=["all:1h", "1h:1d", "1d:30d"]).keeps
    assert steps(kept) == [30, 50, 60, 70, 80]
    later = plan(
        view_of(records),
        RetentionConfig(buckets=["all:1h", "1h:1d", "1d:30d"]),
        now=NOW + timedelta(days=365),
        held={},
    )
    assert steps(later.keeps) == [80]  # a run that ended long ago keeps its end


def test_max_age_goes_before_any_rule() -> None:
    """What a rule would keep goes when it is too old; alone, it lets the younger ones be."""
    records = [record_of(n, age=(4 - n) * 3600) for n in range(1, 5)]
    for rules in ({"latest": 4}, {}):
        plan_of = planned(view_of(records), max_age=5400, **rules)
        assert steps(plan_of.keeps) == [30, 40]
        assert plan_of.verdicts[-1].why == ["older than 90m"]


def test_max_bytes_counts_shared_bytes_once() -> None:
    """The oldest go until the rest fits; a file that several name counts once, as long as one of
    them stays.
    """
    records = [record_of(n) for n in range(1, 5)]
    files = {record.id: {"base": 70, f"own {record.id}": 10} for record in records}
    config = RetentionConfig(max_bytes=100)
    plan_of = plan(view_of(records), config, now=NOW, held={}, files=files)
    assert steps(plan_of.keeps) == [20, 30, 40]
    tight = plan(view_of(records), RetentionConfig(max_bytes=1), now=NOW, held={}, files=files)
    assert steps(tight.keeps) == [40]
    pinned = plan(view_of(records, pins=[0]), config, now=NOW, held={}, files=files)
    assert steps(pinned.keeps) == [10, 30, 40]


def test_nothing_goes_unless_configured() -> None:
    """Whatever it is."""
    standings: list[Standing] = ["zombie", "quarantined", "unhealthy", "damaged", "valid"]
    view = view_of([record_of(n) for n in range(1, 6)], standings)
    assert planned(view).goes == []


@pytest.mark.parametrize("standing", ["zombie", "quarantined", "unhealthy"])
def test_what_no_retry_starts_from_goes(standing: Standing) -> None:
    """Rules count only what a retry could start from; the others go, once that is settled."""
    records = [record_of(n) for n in range(1, 5)]
    view = view_of(records, ["valid", standing, "valid", "valid"])
    plan_of = planned(view, latest=3)
    assert steps(plan_of.goes) == [20]
    assert plan_of.verdicts[2].why == [f"{standing}: a test"]


def test_every_verdict_names_what_decided() -> None:
    """Each rule, each limit and each thing that no rule lets go, in the words that people read."""
    hour = 3600
    ages = [9 * hour, 8 * hour, 7 * hour, 6 * hour, 5 * hour, 4 * hour, 2 * hour, 60]
    records = [
        record_of(n, age=age, epoch=n - 1, loss=0.5 if n == 3 else 9.0)
        for n, age in enumerate(ages, start=1)
    ]
    standings: list[Standing] = ["valid"] * 8
    standings[4] = "quarantined"
    view = view_of(records, standings, pins=[0])
    files = {record.id: {record.id: 100} for record in records}

    def told(**rules: object) -> dict[int, str]:
        config = RetentionConfig(**rules)  # type: ignore[arg-type]
        held = {records[5].id: ["alias 'paper'"]}
        verdicts = plan(view, config, now=NOW, held=held, files=files).verdicts
        return {
            CheckpointId.parse(one.checkpoint).sequence: ("keep: " if one.keep else "expire: ")
            + "; ".join(one.why)
            for one in verdicts
        }

    newest = "keep: the newest that a retry would start from"
    assert told(
        latest=2, best=["1:loss:min"], every_steps=40, every_epochs=4, buckets=["all:3h"]
    ) == {
        1: "keep: pinned: kept by a test",
        2: "expire: no rule keeps it",
        3: "keep: best 1 by loss (0.5)",
        4: "keep: first at or after 40 steps; first at or after 4 epochs",
        5: "expire: quarantined: a test",
        6: "keep: alias 'paper'",
        7: "keep: latest 2; younger than 3h",
        8: f"{newest}; latest 2; first at or after 80 steps; first at or after 8 epochs; "
        "younger than 3h",
    }
    aged = told(buckets=["1h:1d"], max_age=5.0 * hour)
    assert (aged[3], aged[7]) == ("expire: older than 5h", "keep: newest of its 1h, for 1d")
    small = told(max_bytes=350)
    assert small[2] == "expire: what is kept would take 700 bytes, more than 350 bytes"
    assert small[7] == "expire: what is kept would take 400 bytes, more than 350 bytes"
    assert (small[6], small[8]) == (
        "keep: alias 'paper'; within the limits",
        f"{newest}; within the limits",
    )


def test_zombies_wait_for_what_replaces_them() -> None:
    """An attempt that went back, and has not saved yet, costs no checkpoint."""
    records = [record_of(n) for n in range(1, 4)]
    view = view_of(records, ["valid", "zombie", "zombie"], trained=2)
    assert steps(planned(view, latest=1).keeps) == [10, 20, 30]
    later = view_of(
        [*records, record_of(4, attempt=2)], ["valid", "zombie", "zombie", "valid"], trained=2
    )
    assert steps(planned(later, latest=1).keeps) == [40]


def test_nothing_goes_where_nothing_could_be_started_from() -> None:
    """Damaged, unhealthy: all of it may be needed by a person."""
    records = [record_of(n) for n in range(1, 4)]
    view = view_of(records, ["quarantined", "unhealthy", "expired"])
    assert steps(planned(view, latest=1, max_age=1.0).goes) == [30]  # as it has before


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "latest": st.integers(1, 3),
        "best": st.just(["1:loss:min"]),
        "every_steps": st.integers(1, 50),
        "every_epochs": st.integers(1, 3),
        "buckets": st.just(["10s:30s"]),
        "max_age": st.floats(1, 100),
        "max_bytes": st.integers(1, 500),
    },
)
STANDINGS = st.sampled_from(["valid", "zombie", "unhealthy", "expired", "quarantined", "damaged"])


@given(
    config=CONFIGS,
    standings=st.lists(STANDINGS, min_size=1, max_size=8),
    ages=st.lists(st.floats(0, 200), min_size=8, max_size=8),
    losses=st.lists(st.floats(0, 3), min_size=8, max_size=8),
    pinned=st.sets(st.integers(0, 7)),
    aliased=st.sets(st.integers(0, 7)),
    trained=st.integers(1, 2),
)
def test_newest_pinned_and_aliased_never_go(
    config: dict[str, object],
    standings: list[Standing],
    ages: list[float],
    losses: list[float],
    pinned: set[int],
    aliased: set[int],
    trained: int,
) -> None:
    """Whatever the rules say."""
    records = [
        record_of(n + 1, age=ages[n], epoch=n, loss=losses[n]) for n in range(len(standings))
    ]
    view = view_of(records, standings, pins=sorted(pinned), trained=trained)
    held = {record.id: ["alias 'best'"] for n, record in enumerate(records) if n in aliased}
    plan_of = plan(view, RetentionConfig(**config), now=NOW, held=held)  # type: ignore[arg-type]
    assert [v.checkpoint for v in plan_of.verdicts] == [c.id for c in view.checkpoints]
    assert all(verdict.why for verdict in plan_of.verdicts)
    never = {record.id for n, record in enumerate(records) if n in pinned | aliased}
    if view.newest is not None:
        never.add(view.newest.id)
    assert never.isdisjoint(plan_of.goes)
