"""Configuration: one frozen, typed model per component, composed in `CheckpointConfig`.

The same names serve TOML files, the environment (``CKPT_TASKS_<SECTION>_<KEY>``), keyword
arguments and, for the common ones, command-line flags.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "AttemptConfig",
    "CheckpointConfig",
    "RegistryConfig",
    "ScheduleConfig",
    "StoreConfig",
]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Where checkpoints are stored."""

    url: str = "checkpoints"
    """Root: a path, or a URL that fsspec opens (``s3://bucket/prefix``)."""
    single_writer: bool = False
    """Declare that no two attempts can ever write at once. Needed for a store without a
    conditional create, where the fence cannot hold otherwise."""
    options: dict[str, str | int | float | bool] = {}
    """Options for the file system, as fsspec names them (``endpoint_url``). Never credentials:
    those come from the environment or the cloud's own configuration."""


class ScheduleConfig(_Section, frozen=True, kw_only=True):
    """When a save is due; any of them."""

    every_steps: int | None = None
    every_epochs: int | None = None
    every: float | None = None
    """Seconds since the last save (TOML, environment and flags also take ``"10m"``)."""
    final: bool = True
    """Save when training ends."""


class RegistryConfig(_Section, frozen=True, kw_only=True):
    """Where checkpoints are registered; without a `tracking_uri`, nowhere."""

    kind: str = "mlflow"
    """Name of the entry point in the group ``ckpt_tasks.registries``."""
    tracking_uri: str | None = None
    experiment: str = "ckpt_tasks"
    registered_model: str | None = None
    """Default: the experiment's name."""
    best: str | None = None
    """``METRIC:min`` or ``METRIC:max``: the alias ``best`` follows it."""
    hyperparameter_tags: list[str] | None = None
    """Hyperparameters shown as tags of each version. Default: the first few."""


class AttemptConfig(_Section, frozen=True, kw_only=True):
    """How attempts follow one another and end."""

    heartbeat: float = 5.0
    """Seconds between two heartbeats."""
    takeover_after: float = 60.0
    """Seconds without a heartbeat, by the observer's own clock, after which another
    invocation takes over."""
    without_commit: int = 5
    """Attempts of one invocation in a row that may end without a new commit."""
    grace: float = 30.0
    """Seconds that the trainer has to save and stop after a signal."""
    max_unprotected: float = 1800.0
    """Seconds without a durable checkpoint, while saves fail, after which the attempt fails."""
    drain: float = 60.0
    """Seconds that the registrar has to empty its queue after the trainer has ended."""


class CheckpointConfig(_Section, frozen=True, kw_only=True):
    """All of it."""

    store: StoreConfig = StoreConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    registry: RegistryConfig = RegistryConfig()
    attempt: AttemptConfig = AttemptConfig()
