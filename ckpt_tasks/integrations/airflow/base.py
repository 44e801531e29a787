"""Bases of the operators: which store, which run, and which failures are worth a retry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowFailException

from ckpt_tasks.config import CheckpointConfig, RegistryConfig
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.connections import refuse_credentials

__all__ = ["RunOperator", "StepOperator", "StoreOperator", "StoreStepOperator"]


class StoreOperator(BaseOperator):
    """Base of all: which store, with which registry.

    Parameters
    ----------
    store
        Root of the store: a path, or a URL, which may name the Airflow connection that has the
        credentials (``s3://aws_default@bucket/prefix``). Default: that of `ckpt_conn_id`, else
        the configuration's (``CKPT_TASKS_STORE_URL``, or a file).
    ckpt_conn_id
        Connection of the type ``ckpt_tasks``.
    mlflow_conn_id
        Connection of the type ``mlflow``. Default: the tracking URI of `registry`, if it has one.
    registry
        Experiment, registered model, and what is best.

    Raises
    ------
    ConfigError
        `store` has credentials in it, which Airflow would show.
    """

    template_fields: Sequence[str] = ("store", "ckpt_conn_id", "mlflow_conn_id")
    ui_color = "#e8f3ff"

    def __init__(
        self,
        *,
        store: str | None = None,
        ckpt_conn_id: str | None = None,
        mlflow_conn_id: str | None = None,
        registry: RegistryConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse_credentials(store)
        self.store = store
        self.ckpt_conn_id = ckpt_conn_id
        self.mlflow_conn_id = mlflow_conn_id
        self.registry = registry

    def _settings(self) -> Settings:
        return Settings(
            store=self.store,
            ckpt_conn_id=self.ckpt_conn_id,
            mlflow_conn_id=self.mlflow_conn_id,
            registry=self.registry,
        )

    @contextmanager
    def _only_worthwhile_retries(self) -> Iterator[None]:
        from ckpt_tasks.tasks import is_worth_retrying

        try:
            yield
        except CkptTasksError as error:
            if is_worth_retrying(error):
                raise
            raise AirflowFailException(str(error)) from None


class StoreStepOperator(StoreOperator):
    """Base of the steps: what one does is `_execute`."""

    def execute(self, context: Context) -> Any:
        """Do the step; what it returns is kept as an XCom."""
        with self._only_worthwhile_retries(), self._settings().applied() as config:
            return self._execute(context, config)

    @abstractmethod
    def _execute(self, context: Context, config: CheckpointConfig) -> Any:
        """Do the step, with store and registry reachable."""


class RunOperator(StoreOperator):
    """Base of those that are about one run.

    Parameters
    ----------
    run_name
        Name of the training run.
    **kwargs
        As `StoreOperator` takes them.
    """

    template_fields: Sequence[str] = ("run_name", *StoreOperator.template_fields)

    def __init__(self, *, run_name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_name = run_name


class StepOperator(RunOperator, StoreStepOperator):
    """Base of the steps of one run."""
