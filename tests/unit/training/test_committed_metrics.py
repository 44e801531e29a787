"""Metrics that are published once they are committed, and those that a dead attempt leaves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_runs import MadeAttempt, MadeRun

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import RegistryError
from ckpt_tasks.events import Event, EventSink, MetricsReplayed, discard_event
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.registry.base import RunDescription, RunStatus
from ckpt_tasks.testing import FakeClock, MemoryRegistry, RegistryMemory
from ckpt_tasks.training.registration.backlog import find_backlog
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.registration.tail import MAX_ROWS, read_tails, write_tail
from ckpt_tasks.types import MetricRow

Row = tuple[str, float, int, int]


def _publisher(
    run: MadeRun,
    memory: RegistryMemory,
    attempt: MadeAttempt,
    on_event: EventSink = discard_event,
    *,
    live: bool = False,
    tails_after: float | None = None,
) -> Publisher:
    description = RunDescription(
        run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
    )
    return Publisher(
        run.store,
        run.layout,
        Fence(run.store, run.layout, attempt.number),
        MemoryRegistry(memory),
        RegistryConfig(metrics="live" if live else "committed"),
        description,
        on_event,
        tails_after=tails_after,
        clock=FakeClock(),
    )


def _rows(value: float, steps: Sequence[int], time_ms: int) -> list[Row]:
    return [("loss", value, step, time_ms + step) for step in steps]


def _stored(memory: RegistryMemory) -> dict[int, float]:
    (run,) = memory.runs.values()
    assert len({row.step for row in run.rows}) == len(run.rows)
    return {row.step: row.value for row in run.rows}


def _end(publisher: Publisher, status: RunStatus) -> None:
    publisher.settle(status)
    publisher.publish()
    publisher.end(status)


def test_the_replay_stands_and_is_compared() -> None:
    """Steps reach the registry with the checkpoint that holds them. What an attempt logs behind
    its last one is not shown, but compared with what its successor logs for the same steps.
    """
    run, memory = MadeRun(), RegistryMemory()
    first = run.begin()
    publisher = _publisher(run, memory, first)
    publisher.add_rows(_rows(0.5, [1, 2], 0))
    publisher.publish()
    (stored,) = memory.runs.values()
    assert not stored.rows
    saved = str(first.save(2, rows=_rows(0.5, [1, 2], 0)))
    publisher.add_save(saved)
    publisher.add_rows(_rows(0.5, [3, 4, 5], 0))
    publisher.add_commit(saved)
    publisher.publish()
    assert _stored(memory) == {1: 0.5, 2: 0.5}
    _end(publisher, "failed")
    assert _stored(memory) == {1: 0.5, 2: 0.5}

    events: list[Event] = []
    second = run.begin()
    publisher = _publisher(run, memory, second, events.append)
    publisher.add_rows(_rows(0.5, [3], 900))
    publisher.add_rows(_rows(0.75, [4, 5, 6], 900))
    publisher.publish()
    (told,) = [event for event in events if isinstance(event, MetricsReplayed)]
    assert (told.replay.steps, told.replay.diverged_steps) == (3, 2)
    assert told.replay.first is not None
    assert (told.replay.first.step, told.replay.first.replayed) == (4, 0.75)
    _end(publisher, "finished")
    assert _stored(memory) == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.75, 5: 0.75, 6: 0.75}


def test_steps_that_the_registry_has_are_compared_with_it() -> None:
    """An attempt that was sent back to an older checkpoint does steps again that a later one held,
    and that are shown already.
    """
    run, memory = MadeRun(), RegistryMemory()
    first = run.begin()
    publisher = _publisher(run, memory, first)
    saved = []
    for steps in ([1, 2], [3, 4]):
        rows = _rows(0.5, steps, 0)
        publisher.add_rows(rows)
        saved.append(str(first.save(steps[-1], rows=rows)))
        publisher.add_save(saved[-1])
        publisher.add_commit(saved[-1])
    publisher.publish()
    _end(publisher, "failed")

    events: list[Event] = []
    publisher = _publisher(
        run, memory, run.begin("flow-run-2", resume=saved[0]), on_event=events.append
    )
    publisher.add_rows(_rows(0.75, [3, 4, 5], 900))
    publisher.publish()
    (told,) = [event for event in events if isinstance(event, MetricsReplayed)]
    assert (told.replay.steps, told.replay.diverged_steps) == (2, 2)
    _end(publisher, "finished")
    assert _stored(memory) == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.75}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),  # steps it does
            st.sets(st.integers(1, 6)),  # of them, those behind which it saves
            st.sets(st.integers(1, 6)),  # of these saves, those that become checkpoints
            st.booleans(),  # whether its registrar dies before all is published
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_step_once_with_the_value_that_the_checkpoints_come_from(
    attempts: list[tuple[int, set[int], set[int], bool]],
) -> None:
    """However often attempts die, wherever they save: the registry has, of each step up to the
    newest checkpoint, one value, of the attempt whose checkpoint holds it; and of a run that has
    finished, all.
    """
    run, memory = MadeRun(), RegistryMemory()
    truth: dict[int, float] = {}
    start = 0
    for number, (steps, saves, commits, killed) in enumerate(attempts, start=1):
        attempt = run.begin()
        publisher = _publisher(run, memory, attempt)
        is_last = number == len(attempts)
        kept: list[Row] = []
        step = start
        for done in range(1, steps + 1):
            step += 1
            row = ("loss", float(number), step, 100 * number + step)
            publisher.add_rows([row])
            kept.append(row)
            truth[step] = float(number)
            if done in saves:
                saved = str(attempt.save(step, rows=kept)) if done in commits else "none"
                publisher.add_save(saved)
                if done in commits:
                    publisher.add_commit(saved)
                    start, kept = step, []
            if not (killed and done % 2):
                publisher.publish()
        if not killed:
            publisher.publish()
            assert set(_stored(memory)) == set(range(1, start + 1))
        if is_last:
            _end(publisher, "finished")
        elif not killed:
            _end(publisher, "failed")
    expected = {at: value for at, value in truth.items() if at <= step}
    assert _stored(memory) == expected


@pytest.mark.parametrize("live", [True, False])
def test_a_run_that_never_goes_on_loses_no_metric(live: bool) -> None:
    """Live, where the registry was away at the end; committed, in any case: what no checkpoint
    holds is kept in the store and sent later. While the run may go on it is not.
    """
    run, memory = MadeRun(), RegistryMemory()
    attempt = run.begin()
    publisher = _publisher(run, memory, attempt, live=live)
    rows = _rows(0.5, [1, 2, 3, 4], 0)
    publisher.add_rows(rows[:2])
    saved = str(attempt.save(2, rows=rows[:2]))
    publisher.add_save(saved)
    publisher.add_commit(saved)
    publisher.publish()
    publisher.add_rows(rows[2:])
    publisher.settle("failed")
    if live:
        memory.available = False
        with pytest.raises(RegistryError):
            publisher.publish()
        publisher.keep_unsent()
        memory.available = True
    else:
        publisher.publish()
    _publisher(run, memory, attempt, tails_after=3600.0).publish()
    assert _stored(memory) == {1: 0.5, 2: 0.5}
    for _ in range(2):
        _publisher(run, memory, attempt, tails_after=1e-9).publish()
        assert _stored(memory) == dict.fromkeys(range(1, 5), 0.5)


def _backlog(run: MadeRun, tails_after: float) -> dict[int, float]:
    """Values that a registry lacks which has none, by step."""
    rows = find_backlog(
        run.store,
        run.layout,
        run=run.identity,
        registered=(),
        high_water={},
        tails_after=tails_after,
    ).rows
    return {row.step: row.value for row in rows}


def test_tails_of_a_complete_run_are_the_last_attempts() -> None:
    """It may have ended before the step at which an earlier one died: that one's do not count."""
    run = MadeRun()
    first, second = run.begin(), run.begin()
    write_tail(run.store, run.layout, first.number, [MetricRow("loss", 1.0, s, s) for s in (1, 9)])
    write_tail(run.store, run.layout, second.number, [MetricRow("loss", 2.0, 1, 50)])

    assert _backlog(run, 0.0) == {1: 2.0}
    assert _backlog(run, 1e-9) == {1: 2.0, 9: 1.0}


def test_tails_count_from_the_newest_checkpoint_on() -> None:
    """What lies before it, its own rows tell; what the attempts before the one that made it had
    logged beyond, is not of the history that it stands for.
    """
    run = MadeRun()
    first, second = run.begin(), run.begin()
    second.save(5, rows=_rows(2.0, [4], 0))
    for attempt, steps in ((first, (1, 9)), (second, (3, 5, 6))):
        value = float(attempt.number)
        tail = [MetricRow("loss", value, step, step) for step in steps]
        write_tail(run.store, run.layout, attempt.number, tail)
    assert _backlog(run, 1e-9) == {4: 2.0, 5: 2.0, 6: 2.0}


def test_a_damaged_tail_is_none() -> None:
    """It costs no attempt its start; and of too many rows the newest are kept."""
    run = MadeRun()
    attempt = run.begin()
    rows = [MetricRow("loss", float("nan"), step, step) for step in range(MAX_ROWS + 5)]
    write_tail(run.store, run.layout, attempt.number, rows)
    views = read_attempts(run.store, run.layout)
    ((*kept,),) = read_tails(run.store, run.layout, views, behind=None)
    assert [kept[0].step, kept[-1].step, len(kept)] == [5, MAX_ROWS + 4, MAX_ROWS]
    run.damage(run.layout.tail(attempt.number), position=100)
    assert read_tails(run.store, run.layout, views, behind=None) == []
