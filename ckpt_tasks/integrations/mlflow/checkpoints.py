"""Checkpoints in MLflow: a logged model of the run, then a version of the registered model.

The version is made last. So a version in MLflow says that everything before it was done, and a
registration that died in between is found again by the logged model's tags and completed.

MLflow refuses no second logged model or version of one checkpoint, and two processes may
register it at once: an attempt's registrar and one that is late with a complete run. So both are
looked for right before they are made, and again afterwards; of twins the older stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TypedDict

import msgspec
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ckpt_tasks.errors import RegistryRefusedError
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.aliases import CHECKPOINT_TAG, value_tags
from ckpt_tasks.integrations.mlflow.connection import Connection, error_code
from ckpt_tasks.integrations.mlflow.description import (
    checkpoint_description,
    logged_model_name,
    logged_model_params,
    version_tags,
)
from ckpt_tasks.integrations.mlflow.manifests import log_manifest, remove_manifest
from ckpt_tasks.integrations.mlflow.metrics import OWN_PREFIX, ROWS_PER_CALL, RunMetrics
from ckpt_tasks.integrations.mlflow.note import NOTE_TAG
from ckpt_tasks.integrations.mlflow.runs import UID_TAG, user_tags
from ckpt_tasks.registry import Registration, RegistryRunIds

__all__ = ["Checkpoints"]

_VERSIONS_TAG = "mlflow.modelVersions"  # what a logged model's page links to
_PAGE = 200


class Checkpoints:
    """Logged models and versions of one run.

    Parameters
    ----------
    connection
        To MLflow.
    ids, uid, run
        Of the run; `run` is its name.
    metrics
        The run's metrics.
    hyperparameter_tags
        Hyperparameters that become tags of a version; ``None`` for the first few.
    best_metric
        The metric that the alias ``best`` follows.
    """

    def __init__(
        self,
        connection: Connection,
        ids: RegistryRunIds,
        *,
        uid: str,
        run: str,
        metrics: RunMetrics,
        hyperparameter_tags: list[str] | None,
        best_metric: str | None,
    ) -> None:
        self._connection = connection
        self._ids = ids
        self._uid = uid
        self._run = run
        self._metrics = metrics
        self._hyperparameter_tags = hyperparameter_tags
        self._best_metric = best_metric
        self._outputs: set[str] | None = None
        self._has_registered_model = False

    @property
    def _client(self) -> MlflowClient:
        return self._connection.client

    def registered(self) -> dict[str, Registration]:
        """Every checkpoint of the run that has a version, by checkpoint id."""
        checkpoints = {
            model.model_id: model.tags[CHECKPOINT_TAG]
            for model in self._logged_models(f"tags.`{UID_TAG}` = '{self._uid}'")
            if model.status == LoggedModelStatus.READY and CHECKPOINT_TAG in model.tags
        }
        found: dict[str, Registration] = {}
        for version in self._versions(f"run_id = '{self._ids.run_id}'"):
            checkpoint = checkpoints.get(_model_id(version))
            if checkpoint is not None and version.name == self._ids.registered_model:
                found.setdefault(checkpoint, self._registration(checkpoint, version))
        return found

    def traces(self) -> dict[str, int]:
        """What there is anything of, with how many doubles `register` would remove."""
        models = self._models_by_checkpoint()
        versions: dict[str, list[ModelVersion]] = {}
        for version in self._versions(f"run_id = '{self._ids.run_id}'"):
            if version.name == self._ids.registered_model:
                versions.setdefault(_model_id(version), []).append(version)
        aliases = self._aliases()
        return {
            checkpoint: _count_doubles(
                ids, [v for model in ids for v in versions.get(model, ())], aliases
            )
            for checkpoint, ids in models.items()
        }

    def _models_by_checkpoint(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for model in self._logged_models(f"tags.`{UID_TAG}` = '{self._uid}'"):
            if CHECKPOINT_TAG in model.tags:
                found.setdefault(model.tags[CHECKPOINT_TAG], []).append(model.model_id)
        return found

    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        """Do what is not yet done of a checkpoint's registration."""
        model, version = self._find(record)
        if model is None:
            model = self._make_logged_model(record, uri=uri, manifest=manifest)
        self._complete_params(model, logged_model_params(record, uri=uri, manifest=manifest))
        if version is None:
            self._log_metrics(record, model.model_id)
            if model.status != LoggedModelStatus.READY:
                self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._link_output(model.model_id, record.position.step)
            log_manifest(self._client, self._ids.run_id, record.id, manifest)
            model, version = self._make_version(record, model, uri=uri, manifest=manifest)
        self._link_version(model, version)
        return self._registration(record.id, version)

    def held(self) -> dict[str, list[str]]:
        """What is in use, by checkpoint id: see `Registry.held`."""
        checkpoints = {
            model: checkpoint
            for checkpoint, models in self._models_by_checkpoint().items()
            for model in models
        }
        aliases = self._aliases()
        held: dict[str, list[str]] = {}
        for version in self._versions(f"run_id = '{self._ids.run_id}'"):
            checkpoint = checkpoints.get(_model_id(version))
            if checkpoint is not None:
                held.setdefault(checkpoint, []).extend(self._uses(version, aliases))
        return {checkpoint: reasons for checkpoint, reasons in held.items() if reasons}

    def forget(self, checkpoint: str, *, aliases: bool) -> None:
        """Delete alias, version, manifest, then logged model: see `Registry.forget`."""
        models = self._models_of(checkpoint)
        versions = [
            version
            for model in models
            for version in self._versions(f"source_path = '{_source(model.model_id)}'")
        ]
        pointing = self._aliases() if versions else {}
        reasons = [
            use for version in versions for use in self._uses(version, {} if aliases else pointing)
        ]
        if reasons:
            raise RegistryRefusedError(f"{checkpoint} is in use: {', '.join(reasons)}")
        for version in versions:
            for alias in pointing.get(str(version.version), ()) if aliases else ():
                self._client.delete_registered_model_alias(version.name, alias)
            self._remove_version(version)
        if models:
            remove_manifest(self._client, self._ids.run_id, checkpoint)
        for model in models:
            self._remove_model(model)

    def _aliases(self) -> dict[str, list[str]]:
        """Aliases of the registered model, by version."""
        try:
            found = self._client.get_registered_model(self._ids.registered_model).aliases
        except MlflowException as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
        aliases: dict[str, list[str]] = {}
        for alias, version in found.items():
            aliases.setdefault(str(version), []).append(alias)
        return aliases

    def _uses(self, version: ModelVersion, aliases: Mapping[str, list[str]]) -> list[str]:
        if version.name != self._ids.registered_model:
            return [f"version {version.version} of {version.name!r}"]
        return [f"alias {alias!r}" for alias in aliases.get(str(version.version), ())]

    def _find(
        self, record: CommitRecord, own: ModelVersion | None = None
    ) -> tuple[LoggedModel | None, ModelVersion | None]:
        """The checkpoint's logged model and version, as far as there are any; twins are removed.

        Twins come of a race, or of a request that was given up and carried out late. Before
        there is a version no logged model is removed: another process may be about to use it.

        Parameters
        ----------
        own
            A version just made, whose logged model another process may have removed.
        """
        models = self._models_of(record.id)
        found = {
            int(version.version): version
            for model in models
            for version in self._versions_of(model)
        }
        if own is not None:
            found[int(own.version)] = own
        if not found:
            return (models[0] if models else None), None
        first = found.pop(min(found))
        kept = {_model_id(first)}
        kept |= {_model_id(twin) for twin in found.values() if not self._remove_version(twin)}
        for model in models:
            if model.model_id not in kept:
                self._remove_model(model)
        of_first = (model for model in models if model.model_id == _model_id(first))
        return next(of_first, None), first

    def _models_of(self, checkpoint: str) -> list[LoggedModel]:
        """The checkpoint's logged models: complete ones first, then the oldest."""
        of_checkpoint = (
            f"tags.`{UID_TAG}` = '{self._uid}' AND tags.`{CHECKPOINT_TAG}` = '{checkpoint}'"
        )
        return sorted(
            self._logged_models(of_checkpoint),
            key=lambda model: (model.status != LoggedModelStatus.READY, _age(model)),
        )

    def _make_logged_model(self, record: CommitRecord, *, uri: str, manifest: bytes) -> LoggedModel:
        """Make it; where another process has made one meanwhile, the older of them is returned."""
        made = self._client.create_logged_model(
            self._ids.experiment_id,
            name=logged_model_name(record.checkpoint),
            source_run_id=self._ids.run_id,
            model_type="checkpoint",
            params=logged_model_params(record, uri=uri, manifest=manifest),
            tags={
                "mlflow.model.isExternal": "true",
                UID_TAG: self._uid,
                "ckpt.run": names.text_value(self._run, names.MAX_TAG),
                CHECKPOINT_TAG: record.id,
                **value_tags(record.metrics, self._best_metric),
                NOTE_TAG: self._description(record, uri=uri, manifest=manifest),
                **user_tags(),
            },
        )
        first = self._models_of(record.id)[0]
        if first.model_id != made.model_id:
            self._remove_model(made)
        return first

    def _complete_params(self, model: LoggedModel, params: dict[str, str]) -> None:
        """More than a hundred take the client several requests, between which it may have died."""
        missing = {key: value for key, value in params.items() if key not in model.params}
        if missing:
            self._client.log_model_params(model.model_id, missing)

    def _log_metrics(self, record: CommitRecord, model_id: str) -> None:
        """Show on the checkpoint the metrics it had; the run gets no second row from it.

        A value is sent as the row that the run holds already, for MLflow writes every metric of
        a logged model to its run as well. One that the run does not hold, or not as a finite
        number (MLflow would show NaN as 0), is told in the version's description only.
        """
        step = record.position.step
        time_ms = round(datetime.fromisoformat(record.created_at).timestamp() * 1000)
        own = {"epoch": record.position.epoch, "bytes": record.size}
        metrics = [
            Metric(OWN_PREFIX + name, float(value), time_ms, step, model_id=model_id)
            for name, value in own.items()
        ]
        for name, value in record.metrics.items():
            row = self._metrics.at(name, float(value), step)
            if row is not None and abs(row.value) < float("inf"):
                metrics.append(
                    Metric(names.key(name), row.value, row.time_ms, row.step, model_id=model_id)
                )
        for start in range(0, len(metrics), ROWS_PER_CALL):
            batch = metrics[start : start + ROWS_PER_CALL]
            self._client.log_batch(self._ids.run_id, metrics=batch, synchronous=True)

    def _link_output(self, model_id: str, step: int) -> None:
        """Make the logged model an output of the run, unless it is one."""
        known = self._read_outputs() if self._outputs is None else self._outputs
        if model_id in known:
            self._outputs = known
            return
        self._outputs = None  # unknown until the call has answered
        try:
            self._client.log_outputs(self._ids.run_id, [LoggedModelOutput(model_id, step)])
        except MlflowException:
            # A database refuses it twice, and another process may have been first.
            if model_id not in self._read_outputs():
                raise
        self._outputs = known | {model_id}

    def _read_outputs(self) -> set[str]:
        run = self._client.get_run(self._ids.run_id)
        outputs = run.outputs.model_outputs if run.outputs is not None else []
        return {output.model_id for output in outputs}

    def _make_version(
        self, record: CommitRecord, model: LoggedModel, *, uri: str, manifest: bytes
    ) -> tuple[LoggedModel, ModelVersion]:
        """Make the version, unless there is one by now; the one that stays, and its model."""
        self._make_registered_model()
        found, version = self._find(record)
        if version is None:
            made = self._create_version(record, model, uri=uri, manifest=manifest)
            found, version = self._find(record, made)
            assert version is not None
        return found or model, version

    def _create_version(
        self, record: CommitRecord, model: LoggedModel, *, uri: str, manifest: bytes
    ) -> ModelVersion:
        try:
            with self._connection.as_default():
                return self._client.create_model_version(
                    self._ids.registered_model,
                    source=_source(model.model_id),
                    model_id=model.model_id,
                    run_id=self._ids.run_id,
                    tags=version_tags(
                        record, run=self._run, hyperparameters=self._hyperparameter_tags
                    ),
                    description=self._description(record, uri=uri, manifest=manifest),
                    await_creation_for=0,
                )
        except MlflowException:
            self._has_registered_model = False  # somebody may have deleted or renamed it
            raise

    def _description(self, record: CommitRecord, *, uri: str, manifest: bytes) -> str:
        return checkpoint_description(record, run=self._run, uri=uri, manifest=manifest)

    def _make_registered_model(self) -> None:
        if self._has_registered_model:
            return
        try:
            self._client.create_registered_model(
                self._ids.registered_model,
                description=(
                    f"Training checkpoints of the experiment **{self._ids.experiment}**, one "
                    "version each. The alias `resume-<run>` marks the one that a run goes on "
                    "from. To compare them, use the experiment's *Models* tab."
                ),
            )
        except MlflowException as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        self._has_registered_model = True

    def _versions_of(self, model: LoggedModel) -> list[ModelVersion]:
        """The model's versions under the registered model's name."""
        return [
            version
            for version in self._versions(f"source_path = '{_source(model.model_id)}'")
            if version.name == self._ids.registered_model
        ]

    def _remove_version(self, twin: ModelVersion) -> bool:
        """Remove a newer twin, unless an alias points at it. Returns whether it is gone."""
        try:
            if self._client.get_model_version(twin.name, twin.version).aliases:
                return False
            self._client.delete_model_version(twin.name, twin.version)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":  # whose twin it is did so already
                raise
        return True

    def _remove_model(self, twin: LoggedModel) -> None:
        try:
            self._client.delete_logged_model(twin.model_id)
        except MlflowException as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _link_version(self, model: LoggedModel, version: ModelVersion) -> None:
        """Let the logged model's page name the version, and none that was its twin.

        A server does the first of it when it makes the version.
        """
        links = _links_of(model)
        link = _VersionLink(name=version.name, version=int(version.version))
        wanted = [*(other for other in links if other["name"] != version.name), link]
        if links != wanted:
            tag = {_VERSIONS_TAG: json.dumps(wanted)}
            self._client.set_logged_model_tags(model.model_id, tag)

    def _logged_models(self, filter_string: str) -> Iterator[LoggedModel]:
        token: str | None = None
        while True:
            page = self._client.search_logged_models(
                [self._ids.experiment_id],
                filter_string=filter_string,
                max_results=_PAGE,
                page_token=token,
            )
            yield from page
            if not (token := page.token):
                return

    def _versions(self, filter_string: str) -> Iterator[ModelVersion]:
        token: str | None = None
        while True:
            page = self._client.search_model_versions(
                filter_string,
                max_results=_PAGE,
                order_by=["version_number ASC"],
                page_token=token,
            )
            yield from page
            if not (token := page.token):
                return

    def _registration(self, checkpoint: str, version: ModelVersion) -> Registration:
        return Registration(
            checkpoint=checkpoint,
            model_id=_model_id(version),
            registered_model=version.name,
            version=str(version.version),
            run_id=self._ids.run_id,
        )


def _count_doubles(
    models: Sequence[str], versions: Sequence[ModelVersion], aliases: Mapping[str, list[str]]
) -> int:
    """How many logged models of a checkpoint would go if it were registered again: those with a
    version go but for the first one's, and what an alias points at.
    """
    if not versions:
        return 0
    ordered = sorted(versions, key=lambda version: int(version.version))
    stay = [ordered[0], *(v for v in ordered[1:] if aliases.get(str(v.version)))]
    return len(versions) - len(stay) + len(set(models) - {_model_id(v) for v in versions})


class _VersionLink(TypedDict):
    name: str
    version: int


def _links_of(model: LoggedModel) -> list[_VersionLink]:
    """The versions that its page names; none where somebody has put something else there."""
    tag = model.tags.get(_VERSIONS_TAG, "[]")
    try:
        return msgspec.json.decode(tag, type=list[_VersionLink])
    except msgspec.DecodeError:
        return []


def _source(model_id: str) -> str:
    return f"models:/{model_id}"


def _model_id(version: ModelVersion) -> str:
    return str(version.source).removeprefix("models:/")


def _age(model: LoggedModel) -> tuple[int, str]:
    return int(model.creation_timestamp), str(model.model_id)
