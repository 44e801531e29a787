"""Prefect blocks: a store and a registry, set up once in the UI, with their credentials.

The credentials become environment variables of the flow's process while a step needs them, and
of the trainer, which inherits them. They appear in no parameter, log, artifact or record.
"""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from prefect.blocks.fields import SecretDict
from pydantic import Field

from ckpt_tasks.config import RegistryConfig, StoreConfig

__all__ = ["CheckpointStore", "ModelRegistry"]


class CheckpointStore(Block):
    """Where the checkpoints of training runs are stored.

    Attributes
    ----------
    url
        Root of the store.
    single_writer
        Declares that no two attempts can ever write at once.
    options
        For the file system, as fsspec names them.
    credentials
        Environment variables for the storage's own library.
    """

    _block_type_name = "Checkpoint Store"
    _block_type_slug = "ckpt-tasks-checkpoint-store"
    _description = "Where ckpt_tasks keeps the checkpoints of training runs."

    url: str = Field(
        description="Root of the store: a path, or a URL such as s3://bucket/prefix.",
        examples=["s3://bucket/checkpoints"],
    )
    single_writer: bool = Field(
        default=False,
        description=(
            "Declare that no two attempts can ever write at once. Only for storage without a "
            "conditional create."
        ),
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Options for the file system, such as endpoint_url. No credentials here.",
    )
    credentials: SecretDict = Field(
        default_factory=lambda: SecretDict({}),
        description="Environment variables that hold credentials, such as AWS_SECRET_ACCESS_KEY.",
    )

    def config(self) -> StoreConfig:
        """The block as configuration, without the credentials."""
        return StoreConfig(url=self.url, single_writer=self.single_writer, options=self.options)


class ModelRegistry(Block):
    """The MLflow registry in which checkpoints become known.

    Attributes
    ----------
    tracking_uri, experiment, registered_model, best, metrics, hyperparameter_tags
        See `ckpt_tasks.config.RegistryConfig`.
    credentials
        Environment variables for the MLflow client.
    """

    _block_type_name = "Checkpoint Registry (MLflow)"
    _block_type_slug = "ckpt-tasks-mlflow-registry"
    _description = "The MLflow server in which ckpt_tasks registers checkpoints."

    tracking_uri: str = Field(
        description="The tracking server, such as https://mlflow.example.org."
    )
    experiment: str = Field(default="ckpt_tasks", description="The experiment of the runs.")
    registered_model: str | None = Field(
        default=None, description="The registered model. Default: the experiment's name."
    )
    best: str | None = Field(
        default=None,
        description="METRIC:min or METRIC:max; the alias 'best' follows it.",
        examples=["val_loss:min"],
    )
    metrics: Literal["live", "committed"] = Field(
        default="live",
        description="Send metrics as they are logged, or once a checkpoint holds their step.",
    )
    hyperparameter_tags: list[str] | None = Field(
        default=None,
        description="Hyperparameters shown as tags of each version. Default: the first few.",
        examples=[["lr", "batch_size"]],
    )
    credentials: SecretDict = Field(
        default_factory=lambda: SecretDict({}),
        description="Environment variables that hold credentials, such as MLFLOW_TRACKING_TOKEN.",
    )

    def config(self) -> RegistryConfig:
        """The block as configuration, without the credentials."""
        return RegistryConfig(
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
            registered_model=self.registered_model,
            best=self.best,
            metrics=self.metrics,
            hyperparameter_tags=self.hyperparameter_tags,
        )
