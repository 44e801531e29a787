"""The alias ``best``: on the registered checkpoint that has the best value of a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.registry.base import AliasHolder, Registration, Registry
from ckpt_tasks.types import CheckpointId

__all__ = ["BEST", "BestAlias", "best_metric"]

BEST = "best"


def best_metric(config: RegistryConfig) -> str | None:
    """The metric that `RegistryConfig.best` names."""
    return config.best.rpartition(":")[0] if config.best is not None else None


class BestAlias:
    """Moves the alias to checkpoints of one run, and never to a worse value.

    The alias is one for all runs of a registered model. So it moves only where this run has a
    better value than the version that holds it, whatever run that is of; equal values leave it
    with the earlier one. Where that version was deleted, has no such value or was found damaged,
    the best of this run takes its place. A registry compares and sets nothing in one step: of
    two runs that check at the same moment the last one wins, though it may be the worse.

    Parameters
    ----------
    registry
        With the run open when `due` is called.
    run_id
        The run's id there.
    attempt
        The attempt under way, for `unmet`.
    """

    def __init__(
        self, registry: Registry, config: RegistryConfig, *, run_id: str, attempt: int
    ) -> None:
        self._registry = registry
        self._metric = best_metric(config)
        self._sign = -1.0 if (config.best or "").endswith(":max") else 1.0
        self._run_id = run_id
        self._attempt = attempt
        self._scores: dict[str, float] = {}
        self._damaged: set[str] = set()
        self._saved = self._carried = False

    def consider(self, record: CommitRecord) -> bool:
        """Know of a registered checkpoint; returns whether it may hold the alias.

        Not where the metric was not logged for its step, or is no finite number, or parameters
        of the checkpoint are none.
        """
        if self._metric is None:
            return False
        if record.checkpoint.attempt == self._attempt:
            self._saved = True
            self._carried |= self._metric in record.metrics
        value = float(record.metrics.get(self._metric, "nan"))
        if record.nonfinite or not math.isfinite(value):
            return False
        self._scores[record.id] = self._sign * value
        return True

    def exclude(self, checkpoints: Iterable[CheckpointId]) -> None:
        """Know of checkpoints that were found damaged: none of them keeps the alias."""
        self._damaged.update(map(str, checkpoints))

    def due(self) -> Registration | None:
        """What the alias is to point at now; ``None`` where it is to stay as it is.

        Raises `RegistryError` as the registry does; it can be called again.
        """
        if self._metric is None or not self._scores:
            return None
        held = self._registry.alias_holder(BEST, self._metric)
        if not self._beats(held):
            return None
        registered = self._registry.registered()
        # Whoever deletes a version does not want it back.
        self._scores = {name: self._scores[name] for name in self._scores if name in registered}
        return registered[self._best()] if self._scores and self._beats(held) else None

    def unmet(self, logged: Iterable[str]) -> str | None:
        """Why the alias could not follow its metric in this attempt, which has ended.

        Parameters
        ----------
        logged
            The metrics that were logged.
        """
        if self._carried or not self._saved or self._metric not in set(logged):
            return None
        return (
            f"the alias 'best' did not move, as {self._metric!r} was logged, but for no step that "
            "was saved; set schedule.every_epochs = 1 if it is logged at the ends of epochs"
        )

    def _best(self) -> str:
        """The best checkpoint; of equal ones the earliest."""

        def rank(name: str) -> tuple[float, int, int]:
            checkpoint = CheckpointId.parse(name)
            return self._scores[name], checkpoint.attempt, checkpoint.sequence

        return min(self._scores, key=rank)

    def _beats(self, held: AliasHolder | None) -> bool:
        if held is None or held.value is None or not math.isfinite(held.value):
            return True
        if held.run_id == self._run_id and held.checkpoint in self._damaged:
            return True
        return self._scores[self._best()] < self._sign * held.value
