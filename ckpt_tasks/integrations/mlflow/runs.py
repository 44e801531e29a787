"""The MLflow run of a training run: found, made, opened by every attempt, ended."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import (
    Experiment,
    LifecycleStage,
    Param,
    Run,
    RunTag,
    SourceType,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

from ckpt_tasks.errors import RegistryError
from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.connection import Connection, error_code
from ckpt_tasks.registry import RegistryRunIds, RunDescription, RunState, RunStatus
from ckpt_tasks.types import Scalar

__all__ = ["UID_TAG", "Runs", "user_tags"]

UID_TAG = "ckpt.uid"

_STATUS: dict[RunStatus, str] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
}
_STATE: dict[str, RunStatus] = {text: status for status, text in _STATUS.items()}
_SQLITE = "sqlite:///"


class Runs:
    """Runs of one experiment.

    Parameters
    ----------
    connection
        To MLflow.
    experiment
        The experiment's name; it is made when first needed.
    registered_model
        Name of the registered model, for the ids.
    """

    def __init__(self, connection: Connection, experiment: str, registered_model: str) -> None:
        self._connection = connection
        self._experiment = experiment
        self._registered_model = registered_model

    @property
    def _client(self) -> MlflowClient:
        return self._connection.client

    def find(self, description: RunDescription) -> RegistryRunIds | None:
        """The oldest run with the description's uid that is not deleted."""
        experiment = self._existing_experiment()
        if experiment is None:
            return None
        found = self._with_uid(experiment.experiment_id, description.uid)
        return self._ids(experiment.experiment_id, found[0]) if found else None

    def create(self, description: RunDescription) -> RegistryRunIds:
        """Make the run, or find the one that an earlier call made."""
        if (found := self.find(description)) is not None:
            return found
        experiment_id = self._experiment_id()
        run = self._client.create_run(
            experiment_id, tags=_tags(description), run_name=description.run
        )
        return self._ids(experiment_id, run)

    def discard(self, ids: RegistryRunIds) -> None:
        """Delete a run, unless it is the last one of its uid."""
        run = self._run_or_none(ids.run_id)
        if run is None or run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return
        same = self._with_uid(run.info.experiment_id, run.data.tags.get(UID_TAG, ""))
        if any(other.info.run_id != ids.run_id for other in same):
            self._client.delete_run(ids.run_id)

    def unused_twins(self, ids: RegistryRunIds) -> list[RegistryRunIds]:
        """Runs of the same uid with neither params nor metrics: nobody has opened them."""
        run = self._client.get_run(ids.run_id)
        same = self._with_uid(run.info.experiment_id, run.data.tags.get(UID_TAG, ""))
        return [
            self._ids(other.info.experiment_id, other)
            for other in same
            if other.info.run_id != ids.run_id and not other.data.params and not other.data.metrics
        ]

    def state(self, ids: RegistryRunIds) -> RunState | None:
        """How the run stands; raises `RegistryError` where its whole experiment was deleted."""
        run = self._run_or_none(ids.run_id)
        if run is None:
            return None
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            self._check_experiment(self._client.get_experiment(run.info.experiment_id))
            return "deleted"
        return _STATE.get(run.info.status, "running")  # SCHEDULED: it was never ended

    def restore(self, ids: RegistryRunIds) -> None:
        """Bring back a run that was deleted."""
        if self.state(ids) == "deleted":
            self._client.restore_run(ids.run_id)

    def open(self, ids: RegistryRunIds, description: RunDescription) -> Run:
        """Mark the run as running, and bring its params and tags up to date. Errors as `read`."""
        run = self.read(ids, description)
        params = _missing_params(run.data.params, description.hyperparameters)
        tags = _changed(run.data.tags, _tags(description))
        # The client splits them into requests that the server takes.
        self._client.log_batch(ids.run_id, params=params, tags=tags, synchronous=True)
        self.set_status(ids.run_id, "running")
        return run

    def read(self, ids: RegistryRunIds, description: RunDescription) -> Run:
        """The run as it is.

        Raises
        ------
        RegistryError
            The run was deleted in MLflow. That was somebody's decision, so it is not made anew;
            the message says how to go on.
        """
        run = self._run_or_none(ids.run_id)
        if run is None:
            raise RegistryError(
                f"run {ids.run_id} of {description.run!r} does not exist at "
                f"{self._connection.shown_uri}; `ckpt-tasks reconcile` makes it anew from the store"
            )
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            self._check_experiment(self._client.get_experiment(run.info.experiment_id))
            raise RegistryError(
                f"run {ids.run_id} of {description.run!r} was deleted in MLflow; restore it there "
                f"(`mlflow runs restore --run-id {ids.run_id}`), or by `ckpt-tasks reconcile`"
            )
        return run

    def set_status(self, run_id: str, status: RunStatus) -> None:
        """Give the run a status; one that it has already keeps the time it was given."""
        if self._client.get_run(run_id).info.status == _STATUS[status]:
            return
        if status == "running":
            self._client.update_run(run_id, status=_STATUS[status])
        else:
            self._client.set_terminated(run_id, status=_STATUS[status])

    def _with_uid(self, experiment_id: str, uid: str) -> list[Run]:
        return list(
            self._client.search_runs(
                [experiment_id],
                filter_string=f"tags.`{UID_TAG}` = '{uid}'",
                run_view_type=ViewType.ACTIVE_ONLY,
                order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
                max_results=100,
            )
        )

    def _run_or_none(self, run_id: str) -> Run | None:
        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _ids(self, experiment_id: str, run: Run) -> RegistryRunIds:
        return RegistryRunIds(
            tracking_uri=self._connection.shown_uri,
            experiment_id=experiment_id,
            experiment=self._experiment,
            run_id=run.info.run_id,
            registered_model=self._registered_model,
        )

    def _experiment_id(self) -> str:
        experiment = self._existing_experiment()
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            return self._client.create_experiment(
                self._experiment, artifact_location=self._artifact_location()
            )
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._experiment_id()

    def _existing_experiment(self) -> Experiment | None:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            self._check_experiment(experiment)
        return experiment

    @staticmethod
    def _check_experiment(experiment: Experiment) -> None:
        """Raise `RegistryError` where it was deleted, and with it all its runs."""
        if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
            raise RegistryError(
                f"the experiment {experiment.name!r} was deleted in MLflow; restore it there "
                f"(`mlflow experiments restore --experiment-id {experiment.experiment_id}`), or "
                "set registry.experiment to another name for new runs"
            )

    def _artifact_location(self) -> str | None:
        """Beside an SQLite file; MLflow would take the working directory of this process."""
        uri = self._connection.tracking_uri
        path = uri.removeprefix(_SQLITE).partition("?")[0]
        if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
            return None
        folder = Path(path).resolve().parent / "mlartifacts" / quote(self._experiment, safe="")
        return folder.as_uri()


def _tags(description: RunDescription) -> dict[str, str]:
    tags = {
        UID_TAG: description.uid,
        "ckpt.run": names.text_value(description.run, names.MAX_TAG),
        "ckpt.store": names.text_value(description.store_url, names.MAX_TAG),
        **_source_tags(description.entrypoint),
        **user_tags(),
    }
    for name, value in description.tags.items():
        tags[names.key(name)] = names.text_value(value, names.MAX_TAG)
    return tags


def _source_tags(entrypoint: str | None) -> dict[str, str]:
    """The tags that MLflow shows as *Source*."""
    if entrypoint is None:
        return {}
    name = names.text_value(entrypoint, names.MAX_TAG)
    return {MLFLOW_SOURCE_NAME: name, MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.LOCAL)}


def user_tags() -> dict[str, str]:
    """The tag that MLflow shows as *Created by*."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # an account without a name, usual in containers
        return {}


def _changed(existing: Mapping[str, str], wanted: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in wanted.items() if existing.get(key) != value]


def _missing_params(existing: Mapping[str, str], wanted: Mapping[str, Scalar]) -> list[Param]:
    """Params to add. MLflow refuses to change one, so a later value of ``lr`` becomes the param
    ``lr.changed-1``, the next ``lr.changed-2``: readable beside it, in the order they were used.
    """
    missing = []
    for name, value in wanted.items():
        text = names.text_value(value, names.MAX_PARAM)
        known = list(_values(existing, name))
        if not known or existing[known[-1]] != text:
            missing.append(Param(_param_key(name, len(known)), text))
    return missing


def _values(existing: Mapping[str, str], name: str) -> list[str]:
    """Keys of the params that hold the values of `name` so far, oldest first."""
    keys: list[str] = []
    while (key := _param_key(name, len(keys))) in existing:
        keys.append(key)
    return keys


def _param_key(name: str, change: int) -> str:
    return names.key(f"{name}.changed-{change}" if change else name)
