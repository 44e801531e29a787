"""`CheckpointSensor`: wait for a checkpoint that another DAG, or no DAG at all, trains."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, Context, PokeReturnValue
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException

from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import RegistryError, StoreError
from ckpt_tasks.integrations.airflow.base import RunOperator

if TYPE_CHECKING:
    from ckpt_tasks.tasks import WantedCheckpoint

__all__ = ["CheckpointSensor"]


class CheckpointSensor(RunOperator, BaseSensorOperator):
    """Wait until a run has a registered checkpoint; without a registry, a committed one.

    It returns the newest checkpoint within the bounds, as an asset's event tells it: ``run``,
    ``checkpoint``, ``uri``, ``digest``, ``epoch``, ``step``, ``metrics``, and with a registry
    ``mlflow_run_id``, ``model_id``, ``registered_model`` and ``version``. A store or registry
    that does not answer is asked again; configuration that cannot work fails at once.

    Parameters
    ----------
    newer_than
        A step, or a checkpoint's id: of an id, what was committed later counts, whatever its
        step.
    better_than
        ``METRIC:min:BOUND`` or ``METRIC:max:BOUND``, as ``val_loss:min:0.25``: the metric at the
        checkpoint is strictly better.
    deferrable
        Wait in the triggerer, without a worker. Default: ``[operators] default_deferrable``.
    **kwargs
        ``run_name``, ``store``, ``ckpt_conn_id``, ``mlflow_conn_id``, ``registry`` as
        `TrainOperator` takes them; ``poke_interval``, ``timeout``, ``mode``, ``soft_fail`` as
        any sensor.
    """

    template_fields: Sequence[str] = (*RunOperator.template_fields, "newer_than", "better_than")

    def __init__(
        self,
        *,
        newer_than: int | str | None = None,
        better_than: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.newer_than = newer_than
        self.better_than = better_than
        self.deferrable = deferrable

    def execute(self, context: Context) -> Any:
        """Wait here, or in the triggerer."""
        with self._only_worthwhile_retries():
            wanted = self._wanted()
            self.log.info("waiting for %s", wanted)
            if not self.deferrable:
                return BaseSensorOperator.execute(self, context)
            return self._defer(wanted)

    def poke(self, context: Context) -> PokeReturnValue:
        """Look once."""
        with self._only_worthwhile_retries(), self._settings().applied() as config:
            found = self._look(config, self._wanted())
        return PokeReturnValue(found is not None, found)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """What the trigger has found.

        Raises
        ------
        AirflowFailException
            Looking can never work; the message says why.
        """
        if event.get("error") is not None:
            raise AirflowFailException(event["error"])
        found: dict[str, Any] = event["found"]
        self.log.info("found %s", found["checkpoint"])
        return found

    def _wanted(self) -> WantedCheckpoint:
        from ckpt_tasks import tasks

        return tasks.parse_wanted(
            self.run_name, newer_than=self.newer_than, better_than=self.better_than
        )

    def _look(self, config: CheckpointConfig, wanted: WantedCheckpoint) -> dict[str, Any] | None:
        from ckpt_tasks import tasks
        from ckpt_tasks.integrations.airflow.assets import checkpoint_extra

        try:
            found = tasks.find(config, wanted)
        except (StoreError, RegistryError) as error:
            self.log.warning("could not look for %s: %s", wanted, error)
            return None
        return checkpoint_extra(found) if found is not None else None

    def _defer(self, wanted: WantedCheckpoint) -> dict[str, Any]:
        """Look once here: what is there already costs no triggerer."""
        from ckpt_tasks.config import load_config
        from ckpt_tasks.integrations.airflow.triggers import CheckpointTrigger

        settings = self._settings()
        with settings.applied() as config:
            found = self._look(config, wanted)
        if found is not None:
            return found
        self.defer(
            trigger=CheckpointTrigger.of(wanted, settings, load_config(), self.poke_interval),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )
        raise AssertionError("defer() raises")
