"""`MlflowRegistry`: the contract of `ckpt_tasks.registry`, kept with MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from mlflow.entities import Run

from ckpt_tasks.config import RegistryConfig
from ckpt_tasks.errors import ConfigError, RegistryError
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.aliases import Aliases
from ckpt_tasks.integrations.mlflow.checkpoints import Checkpoints
from ckpt_tasks.integrations.mlflow.connection import Connection
from ckpt_tasks.integrations.mlflow.history import HistoryReader
from ckpt_tasks.integrations.mlflow.links import page_links
from ckpt_tasks.integrations.mlflow.metrics import RunMetrics
from ckpt_tasks.integrations.mlflow.note import NOTE_TAG, merged_note
from ckpt_tasks.integrations.mlflow.runs import Runs
from ckpt_tasks.registry import (
    AliasHolder,
    Registration,
    Registry,
    RegistryRunIds,
    RunDescription,
    RunState,
    RunStatus,
)
from ckpt_tasks.registry.best import best_metric
from ckpt_tasks.types import MetricRow

__all__ = ["MlflowRegistry"]

T = TypeVar("T")


class MlflowRegistry(Registry):
    """Registers checkpoints in MLflow, on a server or in a database opened directly.

    MLflow's global state (the tracking URI, the active run) is neither read nor changed. Its
    HTTP client gets short time-outs and no retries, unless the environment sets them.

    Parameters
    ----------
    config
        `RegistryConfig.tracking_uri` is needed.

    Raises
    ------
    ConfigError
        Without a tracking URI.
    """

    name: ClassVar[str] = "mlflow"

    def __init__(self, config: RegistryConfig) -> None:
        if config.tracking_uri is None:
            raise ConfigError(
                "registry.tracking_uri is not set; give the URL of an MLflow server, "
                "or sqlite:///PATH"
            )
        self._config = config
        self._connection = Connection(config.tracking_uri)
        self._runs = Runs(
            self._connection,
            config.experiment,
            names.registered_model(config.registered_model or config.experiment),
        )
        self._ids: RegistryRunIds | None = None
        self._metrics: RunMetrics | None = None
        self._checkpoints: Checkpoints | None = None
        self._aliases: Aliases | None = None

    def find_run(self, description: RunDescription) -> RegistryRunIds | None:
        with self._connection.doing(f"search the run {description.run!r}"):
            return self._runs.find(description)

    def create_run(self, description: RunDescription) -> RegistryRunIds:
        with self._connection.doing(f"make the run {description.run!r}"):
            return self._runs.create(description)

    def discard_run(self, ids: RegistryRunIds) -> None:
        with self._connection.doing(f"delete the unused run {ids.run_id}"):
            self._runs.discard(ids)

    def unused_twins(self, ids: RegistryRunIds) -> list[RegistryRunIds]:
        with self._connection.doing(f"search unused twins of the run {ids.run_id}"):
            return self._runs.unused_twins(ids)

    def run_state(self, ids: RegistryRunIds) -> RunState | None:
        with self._connection.doing(f"tell how the run {ids.run_id} stands"):
            return self._runs.state(ids)

    def restore_run(self, ids: RegistryRunIds) -> None:
        with self._connection.doing(f"restore the run {ids.run_id}"):
            self._runs.restore(ids)

    def open_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        with self._connection.doing(f"open the run {description.run!r}"):
            run = self._runs.open(ids, description)
        self._bind(ids, description, run)

    def attach_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        with self._connection.doing(f"find the run {description.run!r}"):
            run = self._runs.read(ids, description)
        self._bind(ids, description, run)

    def _bind(self, ids: RegistryRunIds, description: RunDescription, run: Run) -> None:
        client, connection = self._connection.client, self._connection
        server = connection.tracking_uri if connection.is_server else None
        reader = HistoryReader(client, ids.run_id, server)
        self._metrics = RunMetrics(client, ids.run_id, run.data.tags, reader)
        self._checkpoints = Checkpoints(
            self._connection,
            ids,
            uid=description.uid,
            run=description.run,
            metrics=self._metrics,
            hyperparameter_tags=self._config.hyperparameter_tags,
            best_metric=best_metric(self._config),
        )
        self._aliases = Aliases(self._connection, ids.registered_model)
        self._ids = ids

    def high_water(self) -> dict[str, int]:
        with self._connection.doing("tell which steps the run holds"):
            return _opened(self._metrics).high_water()

    def history(self, key: str, after_step: int, last_step: int | None = None) -> list[MetricRow]:
        with self._connection.doing(f"return the history of {key!r}"):
            return _opened(self._metrics).history(key, after_step, last_step)

    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        with self._connection.doing(f"take {len(rows)} rows of metrics"):
            _opened(self._metrics).log(rows)

    def registered(self) -> dict[str, Registration]:
        with self._connection.doing("list the run's checkpoints"):
            return _opened(self._checkpoints).registered()

    def traces(self) -> dict[str, int]:
        with self._connection.doing("list what it holds of the run's checkpoints"):
            return _opened(self._checkpoints).traces()

    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        with self._connection.doing(f"register {record.id}"):
            return _opened(self._checkpoints).register(record, uri=uri, manifest=manifest)

    def set_alias(self, alias: str, registration: Registration) -> None:
        with self._connection.doing(f"point {alias!r} at version {registration.version}"):
            _opened(self._aliases).set(alias, registration)

    def alias_holder(self, alias: str, metric: str) -> AliasHolder | None:
        with self._connection.doing(f"tell what {alias!r} points at"):
            return _opened(self._aliases).holder(alias, metric)

    def held(self) -> dict[str, list[str]]:
        with self._connection.doing("tell which checkpoints are in use"):
            return _opened(self._checkpoints).held()

    def forget(self, checkpoint: str, *, aliases: bool = False) -> None:
        with self._connection.doing(f"forget {checkpoint}"):
            _opened(self._checkpoints).forget(checkpoint, aliases=aliases)

    def write_note(self, text: str) -> None:
        with self._connection.doing("take the run's description"):
            client, run_id = self._connection.client, _opened(self._ids).run_id
            existing = client.get_run(run_id).data.tags.get(NOTE_TAG, "")
            note = merged_note(existing, text)
            if note != existing:
                client.set_tag(run_id, NOTE_TAG, note)

    def write_tag(self, name: str, text: str) -> None:
        with self._connection.doing(f"take the run's tag {name!r}"):
            value = names.text_value(text, names.MAX_TAG)
            self._connection.client.set_tag(_opened(self._ids).run_id, f"ckpt.{name}", value)

    def end_run(self, status: RunStatus) -> None:
        with self._connection.doing(f"mark the run as {status}"):
            self._runs.set_status(_opened(self._ids).run_id, status)

    def links(self, registration: Registration | None) -> dict[str, str]:
        """Pages for people; none without a server, for nothing then serves them."""
        if not self._connection.is_server:
            return {}
        return page_links(self._connection.shown_uri, _opened(self._ids), registration)

    def close(self) -> None:
        self._connection.close()


def _opened(part: T | None) -> T:
    if part is None:
        raise RegistryError("no run of MLflow is open; call open_run first")
    return part
