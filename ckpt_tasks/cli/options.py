"""Options that several commands share, and the configuration they amount to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from ckpt_tasks.config import CheckpointConfig, StoreConfig, load_config
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.types import CheckpointId

__all__ = ["as_json", "configure", "json_option", "split_checkpoint", "store_options"]

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
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


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
