"""A sweep: one training run for each combination of hyperparameters, and which of them is best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError
from ckpt_tasks.masking import mask_hyperparameters
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.tasks.report import Row, markdown_table
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature, check_params

__all__ = ["Ranking", "Trial", "combinations", "rank"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One training run of a sweep.

    Parameters
    ----------
    value, checkpoint, step
        Its best value of the metric among the valid checkpoints, and where; ``None``: it has
        no checkpoint with the metric.
    complete
        Nothing is left to train.
    """

    run: str
    params: dict[str, Any]
    value: float | None = None
    checkpoint: str | None = None
    step: int | None = None
    complete: bool = False


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The trials, best first, and the same as a Markdown table."""

    metric: str
    mode: Literal["min", "max"]
    trials: list[Trial]
    markdown: str

    @property
    def best(self) -> Trial | None:
        """The best trial; ``None`` where none has the metric."""
        return self.trials[0] if self.trials and self.trials[0].value is not None else None


def combinations(
    signature: EntrypointSignature, grid: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Every combination of the values, checked before the first of them is trained.

    Parameters
    ----------
    grid
        Values by hyperparameter: ``{"lr": [1e-3, 1e-2], "width": [16, 32]}``.

    Raises
    ------
    ConfigError
        The grid is empty, or a name or value does not fit the training function.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"grid: {name} = {values!r} is no list of values; write [{values!r}]")
    if not grid:
        raise ConfigError('the grid is empty; give it values: {"lr": [1e-3, 1e-2]}')
    product = itertools.product(*grid.values())
    found = [dict(zip(grid, values, strict=True)) for values in product]
    for params in found:
        check_params(signature, params)
    return found


def rank(store: StoreConfig, trials: Sequence[Trial], metric: str) -> Ranking:
    """Order the runs of a sweep by the best value that a checkpoint of theirs has.

    Parameters
    ----------
    trials
        Runs and what was varied; the rest is found in the store.
    metric
        ``METRIC:min`` or ``METRIC:max``.

    Raises
    ------
    ConfigError
        `metric` does not say which way is better, or no checkpoint has it.
    StoreError
        Storage did not answer.
    """
    key, mode = _parse_metric(metric)
    known: set[str] = set()
    opened = open_store(store)
    try:
        measured = [_measured(opened, trial, key, mode, known) for trial in trials]
    finally:
        opened.close()
    if known and key not in known:
        hint = did_you_mean(key, known, what="metrics of these runs")
        raise ConfigError(f"no checkpoint has the metric {key!r}; {hint}")
    measured.sort(key=lambda trial: _order(trial.value, mode))
    rows = [_row(place, trial, key) for place, trial in enumerate(measured, start=1)]
    return Ranking(metric=key, mode=mode, trials=measured, markdown=markdown_table(rows))


def _parse_metric(text: str) -> tuple[str, Literal["min", "max"]]:
    key, _, mode = text.rpartition(":")
    if key and mode == "min":
        return key, "min"
    if key and mode == "max":
        return key, "max"
    raise ConfigError(
        f"metric = {text!r} does not say which way is better; write METRIC:min or METRIC:max"
    )


def _measured(
    store: Store, trial: Trial, key: str, mode: Literal["min", "max"], known: set[str]
) -> Trial:
    try:
        view = view_run(store, trial.run)
    except CheckpointNotFoundError:
        return trial
    records = [c.record for c in view.checkpoints if c.standing == "valid" and c.record]
    known.update(*(record.metrics for record in records))
    having = [r for r in records if math.isfinite(float(r.metrics.get(key, math.nan)))]
    complete = view.completed is not None
    if not having:
        return msgspec.structs.replace(trial, complete=complete)
    best = min(having, key=lambda record: _order(float(record.metrics[key]), mode))
    return msgspec.structs.replace(
        trial,
        value=float(best.metrics[key]),
        checkpoint=best.id,
        step=best.position.step,
        complete=complete,
    )


def _order(value: float | None, mode: Literal["min", "max"]) -> float:
    if value is None:
        return math.inf
    return value if mode == "min" else -value


def _row(place: int, trial: Trial, key: str) -> Row:
    varied = mask_hyperparameters(trial.params)
    return {
        "": place,
        **{name: str(value) for name, value in varied.items()},
        key: "none" if trial.value is None else f"{trial.value:.4g}",
        "checkpoint": trial.checkpoint or "none",
        "run": trial.run,
        "complete": "yes" if trial.complete else "no",
    }
