"""``maintain``: reconcile, expire and collect all runs of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    registry_options,
    registry_overrides,
    retention_options,
    retention_overrides,
    store_options,
)
from ckpt_tasks.cli.tables import echo, table
from ckpt_tasks.tasks.maintain import Maintenance, maintenance_rows
from ckpt_tasks.tasks.maintain import maintain as maintain_store
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["maintain"]


@click.command(short_help="Reconcile, expire and collect all runs of a store.")
@click.option(
    "--run-pattern",
    "patterns",
    multiple=True,
    metavar="GLOB",
    help="Only runs of such names: 'nightly-*'; repeatable.",
)
@retention_options
@registry_options
@store_options
@click.option("--dry-run", is_flag=True, help="Change nothing; only tell.")
@json_option
@click.pass_context
def maintain(
    ctx: click.Context,
    /,
    patterns: tuple[str, ...],
    store: str | None,
    config_file: Path | None,
    dry_run: bool,
    json_output: bool,
    **flags: Any,
) -> None:
    """Make MLflow hold what the store has, mark what no rule of [retention] keeps, and remove what
    has expired longer ago than the grace: of every run, or those that a pattern names.

    The rules are those given here, for every run alike. Prints the runs of which something was
    changed, and the total. A run of which something goes wrong is left alone, and the others are
    maintained all the same; then it exits with 1.
    """
    retention = retention_overrides(flags)
    config = configure(store, config_file, {**retention, **registry_overrides(flags)})
    if config.registry.tracking_uri is None:
        echo("no registry is configured: nothing is reconciled", err=True)
    done = maintain_store(config, patterns, dry_run=dry_run, tell=_tell)
    if json_output:
        click.echo(as_json({**msgspec.structs.asdict(done), "total": done.total}))
    else:
        _echo(done)
    if done.problems:
        ctx.exit(EXIT_FAILED)


def _tell(sentence: str) -> None:
    echo(sentence, err=True)


def _echo(done: Maintenance) -> None:
    rows = maintenance_rows([run for run in done.runs if run.changed])
    if rows:
        columns = [column for column in rows[0] if column != "problem"]
        cells = [[str(row[column]) for column in columns] for row in rows]
        for line in table(columns, cells, right="size"):
            echo(line)
    for run in done.problems:
        echo(f"{run.run}: {run.problem}", err=True)
    echo(done)
