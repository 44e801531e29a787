"""Options that several commands share, and the configuration they amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from ckpt_tasks.config import CheckpointConfig, StoreConfig, load_config
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.escaping import printable_json
from ckpt_tasks.types import CheckpointId

__all__ = [
    "as_json",
    "configure",
    "json_option",
    "one_checkpoint",
    "registry_options",
    "registry_overrides",
    "retention_options",
    "retention_overrides",
    "split_checkpoint",
    "split_params",
    "store_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def store_options(command: F) -> F:
    """``--store`` and ``--config``."""
    for option in (
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            help="Configuration; default: what CKPT_TASKS_CONFIG names.",
        ),
        click.option(
            "--store",
            metavar="URL",
            help="Root of the store: a path, s3://...; default: store.url of the configuration, "
            f"else ./{StoreConfig().url}.",
        ),
    ):
        command = option(command)
    return command


def registry_options(command: F) -> F:
    """``--tracking-uri``, ``--experiment`` and ``--registered-model``."""
    for option in (
        click.option("--registered-model", metavar="NAME", help="Default: the experiment's name."),
        click.option("--experiment", metavar="NAME", help="MLflow experiment."),
        click.option(
            "--tracking-uri", metavar="URI", help="MLflow; without one, nothing is registered."
        ),
    ):
        command = option(command)
    return command


def registry_overrides(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `registry_options` gave, as `configure` takes it."""
    return {f"registry.{key}": value for key, value in flags.items()}


_RETENTION = {
    "keep_latest": "latest",
    "keep_best": "best",
    "keep_every_steps": "every_steps",
    "keep_every_epochs": "every_epochs",
    "keep_bucket": "buckets",
    "max_age": "max_age",
    "max_bytes": "max_bytes",
    "grace": "grace",
}


def retention_options(command: F) -> F:
    """``--keep-latest``, ``--keep-best`` and all others of ``[retention]``."""
    for option in (
        click.option(
            "--grace",
            metavar="DURATION",
            help="How long expired bytes stay; longer than any save. Default: 1h.",
        ),
        click.option("--max-bytes", metavar="SIZE", help="More than so many go, the oldest first."),
        click.option("--max-age", metavar="DURATION", help="Older ones go."),
        click.option(
            "--keep-bucket",
            multiple=True,
            metavar="EVERY:FOR",
            help="Keep one of each, for so long: all:1h, 1h:1d, 1d:30d; repeatable.",
        ),
        click.option(
            "--keep-every-epochs", type=int, metavar="N", help="Keep one of every N epochs."
        ),
        click.option(
            "--keep-every-steps", type=int, metavar="N", help="Keep one of every N steps."
        ),
        click.option(
            "--keep-best",
            multiple=True,
            metavar="N:METRIC:min|max",
            help="Keep the N with the best values; repeatable.",
        ),
        click.option("--keep-latest", type=int, metavar="N", help="Keep the newest N."),
    ):
        command = option(command)
    return command


def retention_overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """What those flags say of ``[retention]``, for `configure`; they are taken out of `flags`."""
    given = {key: flags.pop(flag) for flag, key in _RETENTION.items()}
    return {
        f"retention.{key}": list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value not in (None, ())
    }


def json_option(command: F) -> F:
    """``--json``."""
    return click.option("--json", "json_output", is_flag=True, help="Machine-readable output.")(
        command
    )


def configure(
    store: str | None, config_file: Path | None, overrides: dict[str, Any] | None = None
) -> CheckpointConfig:
    """The configuration of file, environment and flags; flags that were not given are None."""
    given = {"store.url": store, **(overrides or {})}
    return load_config(
        config_file, overrides={name: value for name, value in given.items() if value is not None}
    )


def as_json(value: Any) -> str:
    """Indented JSON of records."""
    return printable_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def split_checkpoint(text: str) -> tuple[str, str | None]:
    """``RUN@ID`` taken apart; a run's name may contain ``@`` itself.

    Raises
    ------
    ConfigError
        What stands behind ``@`` begins like an id and is none.
    """
    run, separator, checkpoint = text.rpartition("@")
    if not separator or not checkpoint.startswith("step-"):
        return text, None
    try:
        CheckpointId.parse(checkpoint)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return run, checkpoint


def one_checkpoint(text: str) -> tuple[str, str]:
    """Run and id of ``RUN@ID``; raises `ConfigError` where there is no id."""
    run, checkpoint_id = split_checkpoint(text)
    if checkpoint_id is None:
        raise ConfigError(f"{text!r} names no checkpoint; write RUN@ID, as `ckpt-tasks ls` shows")
    return run, checkpoint_id


def split_params(params: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE``, each once. Raises ``click.UsageError``."""
    split: dict[str, str] = {}
    for text in params:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise click.UsageError(f"-p {text!r} is not KEY=VALUE")
        if name in split:
            raise click.UsageError(f"hyperparameter {name!r} is given twice")
        split[name] = value
    return split
