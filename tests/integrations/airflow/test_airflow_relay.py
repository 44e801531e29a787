"""What an attempt's events become in Airflow, and what a failure to show them costs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support import dag_home  # noqa: F401 - before Airflow is imported
from support.toy_runs import toy_spec

# isort: split
from ckpt_tasks import events
from ckpt_tasks.config import CheckpointConfig, DashboardConfig
from ckpt_tasks.integrations.airflow.operators import TrainOperator
from ckpt_tasks.integrations.airflow.relay import STATE_KEY, Relay
from ckpt_tasks.testing import FakeClock
from ckpt_tasks.types import Position

COMMITTED = events.CheckpointCommitted(
    checkpoint="step-00000003-a1-s1",
    position=Position(step=3),
    trigger="steps",
    reason="every 3 steps",
    size=10,
    seconds=0.1,
)


class Kept(dict[str, Any]):
    """Airflow's task state store, and its XComs: both are told a key and a value."""

    broken = False

    def set(self, key: str, value: Any) -> None:
        if self.broken:
            raise ConnectionError("the API server is away")
        self[key] = value

    def xcom_push(self, key: str, value: Any) -> None:
        self.set(key, value)


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def relay(kept: Kept, clock: FakeClock) -> Relay:
    operator: Any = SimpleNamespace(
        log=logging.getLogger("operator"), operator_extra_links=TrainOperator.operator_extra_links
    )
    context: Any = {"ti": kept, "task_state_store": kept}
    return Relay(operator, context, toy_spec("memory://relay"), {}, clock=clock)


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_progress_is_told_every_ten_seconds(
    relay: Relay, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """At once the first time; then steps of milliseconds do not fill the log."""
    caplog.set_level(logging.INFO)
    for step in range(1, 26):
        relay(events.Progress(position=Position(epoch=step // 10, step=step), epochs=4))
        clock.advance(1.0)

    assert _lines(caplog) == [
        "epoch 1 of 4, step 1",
        "epoch 2 of 4, step 11",
        "epoch 3 of 4, step 21",
    ]


def test_output_and_checkpoints_are_told_as_they_come(
    relay: Relay, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    """A line each; the state store has the newest checkpoint."""
    caplog.set_level(logging.INFO)
    relay(events.OutputLine(text="loss 0.5"))
    relay(COMMITTED)

    assert _lines(caplog)[0] == "loss 0.5"
    assert _lines(caplog)[1].startswith("saved step-00000003-a1-s1, 10 bytes")
    assert kept[STATE_KEY] == {"run": "toy", "checkpoint": "step-00000003-a1-s1", "step": 3}


def test_pages_are_there_while_it_trains(relay: Relay, kept: Kept) -> None:
    """Written once for each address, not only when the task has ended."""
    linked = events.RegistryLinked(
        tracking_uri="http://mlflow",
        experiment_id="1",
        run_id="r",
        links={"run": "http://mlflow/#/run"},
    )
    relay(linked)
    run_link, version_link, _ = TrainOperator.operator_extra_links
    assert kept == {run_link.xcom_key: "http://mlflow/#/run"}
    kept.clear()
    relay(linked)
    assert kept == {}
    assert version_link.xcom_key not in kept


def test_what_cannot_be_shown_stops_no_training(
    relay: Relay, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    """The line stands in the log all the same, with a warning that says what was not kept."""
    caplog.set_level(logging.INFO)
    kept.broken = True

    relay(COMMITTED)

    assert _lines(caplog)[0].startswith("saved step-00000003-a1-s1")
    assert "could not show CheckpointCommitted" in caplog.text
    assert "the API server is away" in caplog.text
    kept.broken = False
    relay(COMMITTED)
    assert kept[STATE_KEY]["step"] == 3


@pytest.mark.parametrize(
    "event",
    [
        events.AttemptClaimed(run="a/b", uid="u", attempt=1, invocation="i", pid=1),
        events.RunFoundComplete(run="a/b", uid="u", attempt=1),
    ],
)
def test_dashboard_is_linked_where_there_is_one(kept: Kept, event: events.Event) -> None:
    """From the beginning, and of a run that has nothing left to train; its name is quoted."""
    config = CheckpointConfig(dashboard=DashboardConfig(url="https://ckpt.example.org/{run}?tab=1"))
    spec = msgspec.structs.replace(toy_spec("memory://relay", run="a/b"), config=config)
    operator: Any = SimpleNamespace(
        log=logging.getLogger("operator"), operator_extra_links=TrainOperator.operator_extra_links
    )
    context: Any = {"ti": kept}

    Relay(operator, context, spec, {})(event)

    dashboard = TrainOperator.operator_extra_links[-1]
    assert kept[dashboard.xcom_key] == "https://ckpt.example.org/a%2Fb?tab=1"
