"""``alias``: name a registered checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpt_tasks.cli.options import (
    configure,
    one_checkpoint,
    registry_options,
    registry_overrides,
    store_options,
)
from ckpt_tasks.cli.tables import echo
from ckpt_tasks.tasks.promote import promote

__all__ = ["alias"]


@click.command(short_help="Point an alias of MLflow at a checkpoint.")
@click.argument("checkpoint", metavar="RUN@ID")
@click.argument("name")
@registry_options
@store_options
def alias(
    checkpoint: str, name: str, store: str | None, config_file: Path | None, **flags: Any
) -> None:
    """Point the alias NAME of the registered model at a checkpoint's version.

    It keeps the checkpoint, as a pin does, for as long as it points there. The store remembers it
    for an MLflow that loses it; one that is set in MLflow itself is known to MLflow alone.
    """
    run, checkpoint_id = one_checkpoint(checkpoint)
    config = configure(store, config_file, registry_overrides(flags))
    echo(promote(config, run, checkpoint_id, name))
