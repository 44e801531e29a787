"""Combinations of hyperparameters, and which of their runs is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.made_runs import MadeRun

from ckpt_tasks import tasks
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.store import open_store
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature, read_signature


@pytest.fixture
def signature(tmp_path: Path) -> EntrypointSignature:
    path = tmp_path / "toy.py"
    path.write_text("def train(run, lr: float, width: int = 8, token: str = ''): ...")
    return read_signature(f"{path}:train")


@pytest.fixture
def store(tmp_path: Path) -> StoreConfig:
    return StoreConfig(url=str(tmp_path / "store"))


def _run(store: StoreConfig, name: str, *values: Any) -> None:
    """A run with a checkpoint for each value of the metric."""
    attempt = MadeRun(open_store(store), name).begin()
    for step, value in enumerate(values, start=1):
        attempt.save(step, metrics={} if value is None else {"acc": value})


def test_every_combination_in_the_order_of_the_grid(signature: EntrypointSignature) -> None:
    """The first hyperparameter varies slowest, so a run's number tells its values."""
    found = tasks.combinations(signature, {"lr": [0.1, 0.2], "width": [8, 16]})

    assert found == [
        {"lr": 0.1, "width": 8},
        {"lr": 0.1, "width": 16},
        {"lr": 0.2, "width": 8},
        {"lr": 0.2, "width": 16},
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "empty"),
        ({"lr": []}, "lr"),
        ({"lr": 0.1}, "no list of values"),
        ({"lr": "0.1"}, "no list of values"),
        ({"lr": [0.1], "widht": [8]}, "widht"),
        ({"lr": [0.1], "width": [8, "wide"]}, "width"),
        ({"width": [8]}, "lr"),
    ],
)
def test_grid_that_does_not_fit_is_refused_before_anything_trains(
    signature: EntrypointSignature, grid: dict[str, Any], message: str
) -> None:
    """A wrong name or value anywhere in it, and what is required and missing."""
    with pytest.raises(ConfigError, match=message):
        tasks.combinations(signature, grid)


@pytest.mark.parametrize(("metric", "order"), [("acc:max", "bac"), ("acc:min", "cab")])
def test_runs_are_ranked_by_their_best_checkpoint(
    store: StoreConfig, metric: str, order: str
) -> None:
    """Whichever step it was at; the way that is better is said."""
    _run(store, "a", 0.5, 0.7)
    _run(store, "b", 0.9, 0.8)
    _run(store, "c", 0.2, 0.6)
    trials = [tasks.Trial(run=name, params={"lr": name}) for name in "abc"]

    ranking = tasks.rank(store, trials, metric)

    assert "".join(trial.run for trial in ranking.trials) == order
    assert ranking.best == ranking.trials[0]
    steps = {trial.run: trial.step for trial in ranking.trials}
    assert steps == ({"a": 2, "b": 1, "c": 2} if metric == "acc:max" else {"a": 1, "b": 2, "c": 1})


def test_runs_without_the_metric_come_last_and_are_shown(store: StoreConfig) -> None:
    """A run that died early, one that diverged, and one that never began."""
    _run(store, "early", None)
    _run(store, "diverged", "nan")
    _run(store, "good", 0.5)
    trials = [
        tasks.Trial(run=name, params={"lr": 0.1, "token": "hush"})
        for name in ("early", "diverged", "never", "good")
    ]

    ranking = tasks.rank(store, trials, "acc:max")

    assert ranking.trials[0].run == "good"
    assert [trial.value for trial in ranking.trials] == [0.5, None, None, None]
    assert "| never |" in ranking.markdown
    assert "hush" not in ranking.markdown


def test_nothing_is_best_where_nothing_was_trained(store: StoreConfig) -> None:
    """No error of the ranking hides why the training failed."""
    ranking = tasks.rank(store, [tasks.Trial(run="never", params={})], "acc:max")

    assert ranking.best is None


@pytest.mark.parametrize(
    ("metric", "message"),
    [("acc", "METRIC:min or METRIC:max"), ("acc:best", "which way"), ("accuracy:max", "acc")],
)
def test_metric_that_cannot_rank_is_refused(store: StoreConfig, metric: str, message: str) -> None:
    """Which way is better is never guessed; a metric that nobody logged names those there are."""
    _run(store, "a", 0.5)

    with pytest.raises(ConfigError, match=message):
        tasks.rank(store, [tasks.Trial(run="a", params={})], metric)
