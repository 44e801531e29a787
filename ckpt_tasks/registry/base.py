"""The contract of a registry: what makes committed checkpoints findable outside the store.

A registry is never the truth. Every call may fail with `RegistryError`; the caller queues and
repeats it, so **every call is idempotent**: called twice with the same arguments it leaves the
same state as called once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import msgspec

from ckpt_tasks.format.records import CommitRecord, RegistryRunIds
from ckpt_tasks.types import MetricRow, Scalar

__all__ = [
    "AliasHolder",
    "Registration",
    "Registry",
    "RegistryRunIds",
    "RunDescription",
    "RunState",
    "RunStatus",
]

RunStatus = Literal["running", "finished", "failed", "stopped"]
RunState = RunStatus | Literal["deleted"]
"""``deleted``: hidden from people, and `Registry.restore_run` brings it back."""


class RunDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a registry is told about a training run.

    Parameters
    ----------
    run, uid
        The run's name, and its identity: one registry run per `uid`.
    store_url
        Root of the store, userinfo masked.
    hyperparameters
        Flattened and masked.
    entrypoint
        The training function, as it was named; ``None`` where nothing is trained.
    tags
        Ids of the orchestrator that triggered the run (``prefect.flow_run_id``, ...).
    """

    run: str
    uid: str
    store_url: str
    hyperparameters: Mapping[str, Scalar]
    entrypoint: str | None = None
    tags: Mapping[str, str] = {}


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """Where a checkpoint is found in the registry."""

    checkpoint: str
    model_id: str
    registered_model: str
    version: str
    run_id: str


class AliasHolder(msgspec.Struct, frozen=True, kw_only=True):
    """The version that an alias points at, of whatever run.

    Parameters
    ----------
    run_id
        Of the run in the registry.
    checkpoint
        ``None`` where the version is no checkpoint of this package.
    value
        Of the metric that was asked for, as the checkpoint's commit record has it; ``None``
        where it is not known.
    """

    run_id: str
    checkpoint: str | None
    value: float | None


class Registry(ABC):
    """One registry, bound to one training run by `open_run` or `attach_run`.

    Raises
    ------
    RegistryError
        From any method: the registry failed or did not answer. Repeat the call later.
    RegistryRefusedError
        From any method: it answered, and refuses these arguments. Calls with others may succeed.
    ConfigError
        From `find_run`, `create_run` and `open_run`: the configuration can never work.
    """

    name: ClassVar[str]
    """Names the ids file in the run's folder: ``mlflow`` for ``mlflow.json``."""

    @abstractmethod
    def find_run(self, description: RunDescription) -> RegistryRunIds | None:
        """Search the run by its uid: a crash may have hidden that it was made."""

    @abstractmethod
    def create_run(self, description: RunDescription) -> RegistryRunIds:
        """Make the run, without binding to it."""

    @abstractmethod
    def discard_run(self, ids: RegistryRunIds) -> None:
        """Delete a run made by `create_run` when another process's was chosen.

        The last run of a uid is never deleted.
        """

    @abstractmethod
    def unused_twins(self, ids: RegistryRunIds) -> list[RegistryRunIds]:
        """Other runs of the uid of run `ids` that hold nothing, as a lost race leaves them."""

    @abstractmethod
    def run_state(self, ids: RegistryRunIds) -> RunState | None:
        """How the run stands; ``None`` where there is none of these ids, or no longer."""

    @abstractmethod
    def restore_run(self, ids: RegistryRunIds) -> None:
        """Bring back a run that was deleted."""

    @abstractmethod
    def open_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        """Bind to the run, mark it running, and bring its params and tags up to date.

        A hyperparameter that changed since an earlier attempt, or is too long, never raises.
        """

    @abstractmethod
    def attach_run(self, ids: RegistryRunIds, description: RunDescription) -> None:
        """Bind to the run and leave it as it is, for somebody who does not train it."""

    @abstractmethod
    def high_water(self) -> dict[str, int]:
        """The highest step of each metric key that the run holds."""

    @abstractmethod
    def history(self, key: str, after_step: int, last_step: int | None = None) -> list[MetricRow]:
        """Rows of `key` with a step greater than `after_step`, in any order.

        With `last_step`, up to that step; a registry reads no others then, where it can.
        """

    @abstractmethod
    def log_metrics(self, rows: Sequence[MetricRow]) -> None:
        """Send rows, any number of them. The same row sent again does not double."""

    @abstractmethod
    def registered(self) -> dict[str, Registration]:
        """Every checkpoint of this run that is completely registered, by checkpoint id."""

    @abstractmethod
    def traces(self) -> dict[str, int]:
        """Every checkpoint of this run that the registry holds anything of, be it half registered
        or left of a run that is gone; with the number of doubles that `register` would remove.
        """

    @abstractmethod
    def register(self, record: CommitRecord, *, uri: str, manifest: bytes) -> Registration:
        """Make a committed checkpoint known, completing what an earlier call left half done.

        Its metrics are shown as the rows that the run holds, so send those rows before.

        Parameters
        ----------
        record
            The checkpoint's commit record.
        uri
            Where its commit record lies, userinfo masked.
        manifest
            The record's bytes as stored.
        """

    @abstractmethod
    def set_alias(self, alias: str, registration: Registration) -> None:
        """Point `alias` at a registered checkpoint; the name is sanitised by the registry."""

    @abstractmethod
    def alias_holder(self, alias: str, metric: str) -> AliasHolder | None:
        """What `alias` of the run's registered model points at, be it of another run.

        ``None`` where nothing holds it, or no longer. The value of `metric` must be known for
        checkpoints registered while `RegistryConfig.best` named that metric.
        """

    @abstractmethod
    def held(self) -> dict[str, list[str]]:
        """Checkpoints of this run that are in use here, each with reasons for people.

        In use is what an alias points at, and what has a version of another registered model than
        the run's own, which somebody else has made.
        """

    @abstractmethod
    def forget(self, checkpoint: str, *, aliases: bool = False) -> None:
        """Delete what `register` made of a checkpoint, the version first, as far as it is there.

        Raises `RegistryRefusedError`, and deletes nothing, where the checkpoint is `held`. With
        `aliases`, those of the run's own registered model that point at it go before.
        """

    @abstractmethod
    def write_note(self, text: str) -> None:
        """Replace this package's part of the run's description (Markdown)."""

    @abstractmethod
    def write_tag(self, name: str, text: str) -> None:
        """Set a tag of this package's on the run, which people search by; `name` is a word."""

    @abstractmethod
    def end_run(self, status: RunStatus) -> None:
        """Give the run its status at the end of an attempt."""

    @abstractmethod
    def links(self, registration: Registration | None) -> dict[str, str]:
        """Pages for people: ``run``, and with a registration ``model`` and ``version``."""

    def close(self) -> None:  # noqa: B027 - most registries hold nothing open
        """Release connections."""
