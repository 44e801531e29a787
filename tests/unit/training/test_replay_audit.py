"""Exactly-once metrics and the audit of what is done again: against a plain model of both."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made_runs import MadeRun

from ckpt_tasks.errors import RegistryError, RegistryRefusedError
from ckpt_tasks.events import Event, Warned, discard_event
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.registry.base import Registry, RunDescription
from ckpt_tasks.replay import MAX_KEYS, Divergence, Replay, is_identical
from ckpt_tasks.testing import MemoryRegistry, RegistryMemory
from ckpt_tasks.training.registration.audit import FirstValues, ReplayAudit
from ckpt_tasks.training.registration.metric_queue import MetricQueue
from ckpt_tasks.types import MetricRow, finite_or_text

KEYS = ("loss", "val/acc")
VALUES = st.sampled_from(
    [0.0, -0.0, 0.5, math.nextafter(0.5, 1), -0.5, 1e300, -1e300, math.inf, -math.inf, math.nan]
)
_run = MadeRun()
FENCE = Fence(_run.store, _run.layout, _run.begin().number)


class FailingRegistry(MemoryRegistry):
    """Does not answer some of its calls; what it was to log by then is logged all the same."""

    def __init__(self, memory: RegistryMemory, failures: set[int]) -> None:
        super().__init__(memory)
        self._failures = failures
        self._calls = itertools.count()

    def history(self, key: str, after_step: int, last_step: int | None = None) -> list[MetricRow]:
        self._answer()
        return super().history(key, after_step, last_step)

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        super().log_metrics(rows)
        self._answer()

    def _answer(self) -> None:
        if next(self._calls) in self._failures:
            raise RegistryError("no answer")


def _opened(memory: RegistryMemory, failures: set[int]) -> FailingRegistry:
    registry = FailingRegistry(memory, failures)
    description = RunDescription(run="r", uid="u", store_url="memory:", hyperparameters={})
    registry.open_run(registry.create_run(description), description)
    return registry


def _queue(registry: Registry, bounds: dict[str, int], on_event=discard_event) -> MetricQueue:
    queue = MetricQueue(registry, FENCE, on_event, lambda: None)
    queue.open(registry.high_water(), bounds, [])
    return queue


def _send(queue: MetricQueue) -> None:
    """As a registrar does, again and again."""
    for _ in range(1000):
        try:
            queue.send()
        except RegistryError:
            continue
        return
    raise AssertionError("never sent")


@st.composite
def attempts(draw: st.DrawFn) -> tuple[list[MetricRow], list[MetricRow]]:
    """What a dead attempt had logged, not all of it published; and what its successor logs."""
    lengths = st.integers(0, 8)
    died, resumed, went_on = draw(lengths), draw(lengths), draw(lengths)
    first = {(key, step): draw(VALUES) for step in range(1, died + 1) for key in KEYS}
    published = [
        MetricRow(key, value, step, step)
        for (key, step), value in first.items()
        if draw(st.booleans()) or draw(st.booleans())
    ]
    start = min(resumed, died)
    logged = []
    for step in range(start + 1, died + went_on + 1):
        for key in KEYS:
            if draw(st.booleans()) or draw(st.booleans()):
                same = first.get((key, step), 0.25)
                value = same if draw(st.booleans()) else draw(VALUES)
                logged.append(MetricRow(key, value, step, 1000 + step))
    return published, logged


def _expected(published: list[MetricRow], logged: list[MetricRow]) -> Replay:
    """The same, the simple way."""
    first = {(row.key, row.step): row.value for row in published}
    both = [(row, first[row.key, row.step]) for row in logged if (row.key, row.step) in first]
    differ = [
        Divergence(
            key=row.key,
            step=row.step,
            first=finite_or_text(value),
            replayed=finite_or_text(row.value),
        )
        for row, value in both
        if not (row.value == value or (row.value != row.value and value != value))
    ]
    return Replay(
        steps=len({row.step for row, _ in both}),
        values=len(both),
        diverged_steps=len({one.step for one in differ}),
        diverged_values=len(differ),
        first=differ[0] if differ else None,
        largest=max(differ, key=lambda one: one.absolute, default=None),
        largest_relative=max(differ, key=lambda one: one.relative, default=None),
        keys=dict(
            sorted(Counter(one.key for one in differ).items(), key=lambda kv: (-kv[1], kv[0]))
        ),
    )


@settings(deadline=None)
@given(
    attempts(),
    st.lists(st.integers(0, 40), max_size=6),
    st.sets(st.integers(0, 12)),
    st.integers(0, 3),
)
def test_each_step_once_and_each_difference_counted_once(
    made: tuple[list[MetricRow], list[MetricRow]],
    cuts: list[int],
    failures: set[int],
    restart: int,
) -> None:
    """Whatever the batches, whichever calls fail, and wherever the registrar dies and another
    begins with all rows again: the registry has one row for each metric and step, the first; and
    what the last registrar has found is what a comparison of the two lists finds.
    """
    published, logged = made
    memory = RegistryMemory()
    registry = _opened(memory, failures)
    super(FailingRegistry, registry).log_metrics(published)
    bounds = registry.high_water()
    queue = _queue(registry, bounds)
    edges = sorted({0, *(cut for cut in cuts if cut < len(logged)), len(logged)})
    batches = [logged[a:b] for a, b in itertools.pairwise(edges)]
    for number, batch in enumerate(batches):
        if number == restart:
            queue = _queue(registry, bounds)
            queue.add(logged[: edges[number]])
        queue.add(batch)
        _send(queue)
    (stored,) = memory.runs.values()
    rows = list(stored.rows)
    assert len({(row.key, row.step) for row in rows}) == len(rows)
    assert {(r.key, r.step) for r in rows} == {(r.key, r.step) for r in [*published, *logged]}
    assert rows[: len(published)] == published
    assert repr(queue.replay) == repr(_expected(published, logged))
    last = max((row.step for row in published), default=-1)
    assert queue.has_passed == any(row.step > last for row in logged)


def test_a_step_that_was_missing_is_sent_and_nothing_that_was_done_again() -> None:
    """Between published ones, as a refusal leaves it; nor is it for the registrar that comes in the
    place of the one that sent it.
    """
    memory = RegistryMemory()
    registry = _opened(memory, set())
    registry.log_metrics([MetricRow("loss", 0.5, step, step) for step in (1, 3)])
    bounds = registry.high_water()
    for _ in range(2):
        queue = _queue(registry, bounds)
        queue.add(MetricRow("loss", 0.5, step, 1000 + step) for step in (1, 2, 3, 4))
        queue.send()
        assert (queue.replay.steps, queue.replay.values) == (2, 2)
    (stored,) = memory.runs.values()
    assert sorted(row.step for row in stored.rows) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("first", "replayed", "identical"),
    [
        (math.nan, -math.nan, True),
        (0.0, -0.0, True),
        (math.inf, math.inf, True),
        (0.5, math.nextafter(0.5, 0), False),
        (math.inf, -math.inf, False),
        (math.nan, 0.0, False),
        (1.7e308, math.inf, False),
    ],
)
def test_what_is_identical(first: float, replayed: float, identical: bool) -> None:
    """Every bit counts, but for a NaN's and the sign of zero; in either order."""
    assert is_identical(first, replayed) is identical
    assert is_identical(replayed, first) is identical


def test_first_values_are_read_by_windows() -> None:
    """Of a long history only the steps around the replay are read, each once, and few held."""
    asked: list[tuple[int, int]] = []

    def history(key: str, first: int, last: int) -> list[MetricRow]:
        asked.append((first, last))
        return [MetricRow(key, 0.5, step, step) for step in range(first, last + 1)]

    values = FirstValues(history, {"loss": 1_000_000})
    audit = ReplayAudit()
    for step in range(997_500, 1_000_010):
        row = MetricRow("loss", 0.5 + (step % 1000 == 0), step, 2 * step)
        first = values.find(row)
        assert (first is None) == (step > 1_000_000)
        if first is not None:
            audit.compare(first, row)
    assert asked == [(997_500, 998_499), (998_500, 999_499), (999_500, 1_000_000)]
    found = audit.replay
    assert (found.steps, found.diverged_steps) == (2501, 3)
    assert found.first is not None
    assert found.first.step == 998_000


def test_the_earliest_of_doubled_rows_is_the_first() -> None:
    """Should a registry hold two rows of a step, the one that was logged first stands."""
    rows = [MetricRow("loss", 2.0, 1, 20), MetricRow("loss", 1.0, 1, 10)]
    values = FirstValues(lambda *_: rows, {"loss": 1})
    assert values.find(MetricRow("loss", 1.0, 1, 30)) == rows[1]


def test_few_of_many_metrics_are_named() -> None:
    """Those that differ most often; their names are cut."""
    audit = ReplayAudit()
    for step in range(1, 4):
        for key in range(50 if step == 1 else 5):
            name = f"{key:02d}" + "x" * 1000
            audit.compare(MetricRow(name, 0.0, step, 1), MetricRow(name, 1.0, step, 2))
    keys = audit.replay.keys
    assert len(keys) == MAX_KEYS
    assert list(keys.values()) == [3] * 5 + [1] * 15
    assert {len(key) for key in keys} == {250}


def test_a_history_that_is_refused_holds_nothing_up() -> None:
    """It is told once; rows that may be there already are left out, and all others are sent."""

    class Refusing(MemoryRegistry):
        def history(
            self, key: str, after_step: int, last_step: int | None = None
        ) -> list[MetricRow]:
            if key == "odd":
                raise RegistryRefusedError("INVALID_PARAMETER_VALUE")
            return super().history(key, after_step, last_step)

    memory = RegistryMemory()
    registry = Refusing(memory)
    description = RunDescription(run="r", uid="u", store_url="memory:", hyperparameters={})
    registry.open_run(registry.create_run(description), description)
    registry.log_metrics([MetricRow(key, 0.5, 2, 2) for key in ("odd", "loss")])
    events: list[Event] = []
    queue = _queue(registry, registry.high_water(), events.append)
    queue.add(MetricRow(key, 0.5, step, 9) for step in (1, 2, 3) for key in ("odd", "loss"))
    queue.send()
    (stored,) = memory.runs.values()
    sent = sorted((row.key, row.step) for row in stored.rows)
    assert sent == [("loss", 1), ("loss", 2), ("loss", 3), ("odd", 2), ("odd", 3)]
    assert queue.replay.values == 1
    (warned,) = [event.message for event in events if isinstance(event, Warned)]
    assert "'odd'" in warned
