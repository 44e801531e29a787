"""Where an operator's configuration comes from."""

from __future__ import annotations

import pytest

from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.integrations.airflow.configuration import Settings


def test_schedule_of_the_operator_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the DAG's author says counts, whatever the worker's environment says."""
    monkeypatch.setenv("CKPT_TASKS_SCHEDULE_EVERY_STEPS", "500")
    config, _ = Settings(schedule=ScheduleConfig(every_epochs=2)).resolve()
    assert config.schedule == ScheduleConfig(every_epochs=2)


def test_schedule_of_the_environment_counts_where_the_operator_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A platform can set the frequency for all DAGs that leave it open."""
    monkeypatch.setenv("CKPT_TASKS_SCHEDULE_EVERY_STEPS", "500")
    config, _ = Settings().resolve()
    assert config.schedule == ScheduleConfig(every_steps=500)


def test_each_epoch_is_saved_where_nobody_says_anything() -> None:
    """Without a schedule, no more than an epoch is lost."""
    config, _ = Settings().resolve()
    assert config.schedule == ScheduleConfig(every_epochs=1)
