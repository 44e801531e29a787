"""Where an operator's configuration comes from."""

from __future__ import annotations

import pytest
from support import dag_home  # noqa: F401 - before Airflow is imported

# isort: split
from ckpt_tasks.config import AttemptConfig, ScheduleConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow import TrainOperator, resumable_dag, resumable_sweep
from ckpt_tasks.integrations.airflow.configuration import Settings

TOY = "support.toy_ranks:ddp"


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


def test_ranks_of_the_operator_win_over_attempt_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`nproc` stands for one key: what else is known of attempts stays."""
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_NPROC", "4")
    monkeypatch.setenv("CKPT_TASKS_ATTEMPT_GRACE", "50s")
    given = AttemptConfig(drain=1.0, nproc=8)

    def resolved(**arguments: object) -> AttemptConfig:
        return Settings(**arguments).resolve()[0].attempt  # type: ignore[arg-type]

    assert resolved() == AttemptConfig(grace=50.0, nproc=4)
    assert resolved(nproc=2) == AttemptConfig(grace=50.0, nproc=2)
    assert resolved(attempt=given) == given
    assert resolved(attempt=given, nproc=2) == AttemptConfig(drain=1.0, nproc=2)


def test_ranks_reach_the_train_task_of_each_kind_of_dag() -> None:
    """The author says them once; no rank at all is a mistake where the DAG is written."""
    dag = resumable_dag(TOY, nproc=2)
    sweep = resumable_sweep(TOY, grid={"epochs": [1, 2]}, metric="loss:min", nproc=2)

    assert {dag.get_task(name).nproc for name in ("resolve", "recover", "train")} == {2}
    assert sweep.get_task("train").partial_kwargs["nproc"] == 2
    with pytest.raises(ConfigError, match=r"attempt\.nproc = 0"):
        TrainOperator(task_id="train", entrypoint=TOY, nproc=0)
