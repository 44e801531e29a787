"""``pin``, ``unpin``, ``expire`` and ``collect``: what is kept, and what goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    one_checkpoint,
    registry_options,
    registry_overrides,
    retention_options,
    retention_overrides,
    split_checkpoint,
    store_options,
)
from ckpt_tasks.cli.tables import echo, table
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.retention import CollectReport, RetentionPlan, Verdict
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.tasks.retain import collect as collect_run
from ckpt_tasks.tasks.retain import expire as expire_run
from ckpt_tasks.tasks.retain import expire_checkpoint
from ckpt_tasks.tasks.retain import pin as pin_checkpoint
from ckpt_tasks.tasks.retain import unpin as unpin_checkpoint
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["collect", "expire", "pin", "unpin"]

_dry_run_option = click.option("--dry-run", is_flag=True, help="Change nothing; only tell.")


@click.command(short_help="Keep a checkpoint, whatever the rules say.")
@click.argument("checkpoint", metavar="RUN@ID")
@click.option("--why", default="pinned by hand", metavar="TEXT", help="Shown beside the pin.")
@store_options
def pin(checkpoint: str, why: str, store: str | None, config_file: Path | None) -> None:
    """Keep a checkpoint until it is unpinned; one that has expired is taken back."""
    run, checkpoint_id = one_checkpoint(checkpoint)
    pin_checkpoint(configure(store, config_file), run, checkpoint_id, why=why)
    echo(f"{checkpoint_id} of run {run!r} is pinned")


@click.command(short_help="Leave a checkpoint to the rules again.")
@click.argument("checkpoint", metavar="RUN@ID")
@store_options
def unpin(checkpoint: str, store: str | None, config_file: Path | None) -> None:
    """Leave a checkpoint to the rules again; it goes after a whole grace at the earliest."""
    run, checkpoint_id = one_checkpoint(checkpoint)
    pinned = unpin_checkpoint(configure(store, config_file), run, checkpoint_id)
    state = "is no longer pinned" if pinned else "was not pinned"
    echo(f"{checkpoint_id} of run {run!r} {state}")


@click.command(short_help="Mark what is no longer kept; no byte goes.")
@click.argument("run", metavar="RUN[@ID]")
@retention_options
@registry_options
@store_options
@_dry_run_option
@json_option
def expire(
    run: str,
    store: str | None,
    config_file: Path | None,
    dry_run: bool,
    json_output: bool,
    **flags: Any,
) -> None:
    """Mark what no rule of [retention] keeps, and say of each checkpoint why it stays or goes.

    With @ID, that checkpoint, whatever the rules say. `collect` removes the bytes after the grace.
    """
    config = _configure(store, config_file, flags)
    name, checkpoint_id = split_checkpoint(run)
    if checkpoint_id is not None:
        if dry_run:
            raise click.UsageError("@ID expires one checkpoint, --dry-run plans for all: choose")
        expire_checkpoint(config, name, checkpoint_id)
        echo(f"{checkpoint_id} of run {name!r} is no longer kept")
        return
    planned = expire_run(config, name, dry_run=dry_run)
    if json_output:
        click.echo(as_json(planned))
    else:
        _echo_plan(planned)


@click.command(short_help="Remove what has expired, and what killed writes have left.")
@click.argument("run")
@click.option("--grace", metavar="DURATION", help="How long expired bytes stay. Default: 1h.")
@registry_options
@store_options
@_dry_run_option
@json_option
@click.pass_context
def collect(
    ctx: click.Context,
    /,
    run: str,
    grace: str | None,
    store: str | None,
    config_file: Path | None,
    dry_run: bool,
    json_output: bool,
    **flags: Any,
) -> None:
    """Remove the bytes of checkpoints that have expired longer ago than the grace, and what
    killed writes have left. Bytes that another checkpoint needs stay.

    Exits with 1 where nothing could be deleted, as it is not known what is needed.
    """
    config = configure(store, config_file, {"retention.grace": grace, **registry_overrides(flags)})
    report = collect_run(config, run, dry_run=dry_run)
    if json_output:
        click.echo(as_json(report))
    else:
        _echo_report(report, dry_run=dry_run)
    if report.refused is not None:
        ctx.exit(EXIT_FAILED)


def _configure(
    store: str | None, config_file: Path | None, flags: dict[str, Any]
) -> CheckpointConfig:
    retention = retention_overrides(flags)
    return configure(store, config_file, {**retention, **registry_overrides(flags)})


def _echo_plan(planned: RetentionPlan) -> None:
    if not planned.verdicts:
        echo(f"run {planned.run!r} has no checkpoints yet")
        return
    rows = [_row(verdict) for verdict in planned.verdicts]
    for line in table(["checkpoint", "size", "verdict", "why"], rows, right="size"):
        echo(line)


def _row(verdict: Verdict) -> list[str]:
    size = readable_size(verdict.size) if verdict.size is not None else "-"
    return [
        verdict.checkpoint,
        size,
        "keep" if verdict.keep else "expire",
        "; ".join(verdict.why),
    ]


def _echo_report(report: CollectReport, *, dry_run: bool) -> None:
    would = "would be removed" if dry_run else "removed"
    for checkpoint in report.removed:
        echo(f"{checkpoint}: {would}")
    for folder in report.leftovers:
        echo(f"{folder}: of no checkpoint, {would}")
    for remaining in (*report.waiting, *report.kept):
        echo(f"{remaining.checkpoint}: stays: {remaining.why}")
    if report.uploads:
        echo(f"{report.uploads} uploads, begun and never completed: {would}")
    echo(f"{readable_size(report.freed)} {would}")
    if report.refused is not None:
        echo(f"stopped: {report.refused}", err=True)
