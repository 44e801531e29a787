"""``copy`` and ``adopt``: a run in another store, as its replica or as a run of its own."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    split_checkpoint,
    store_options,
)
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.replica import CopyReport
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.tasks.copy import adopt as adopt_run
from ckpt_tasks.tasks.copy import copy as copy_run
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["adopt", "copy"]


@click.command(short_help="Copy a run to another store, every byte verified.")
@click.argument("run", metavar="RUN[@ID]")
@click.option("--to", "url", required=True, metavar="URL", help="Root of the other store.")
@click.option(
    "--to-option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option for it, as store.options has them: endpoint_url=..., profile=...; repeatable.",
)
@click.option(
    "--to-single-writer",
    is_flag=True,
    help="Nobody else writes there: for a store without conditional creates.",
)
@store_options
@json_option
@click.pass_context
def copy(
    ctx: click.Context,
    run: str,
    url: str,
    options: tuple[str, ...],
    to_single_writer: bool,
    store: str | None,
    config_file: Path | None,
    json_output: bool,
) -> None:
    """Copy the checkpoints of a run to another store, with all files that they refer to. Without
    @ID, all that are kept.

    There the run is a read-only replica, which is listed, verified and loaded like any other, and
    neither trained nor collected until `adopt` makes it a run of its own. Repeated, it brings what
    is new; killed, it goes on. RUN@ID also repairs that checkpoint where its copy is damaged.

    Exits with 1 when a checkpoint was damaged, and not copied.
    """
    name, checkpoint_id = split_checkpoint(run)
    target = StoreConfig(
        url=url, single_writer=to_single_writer, options=dict(map(_option, options))
    )
    report = copy_run(
        configure(store, config_file).store,
        target,
        name,
        checkpoint=checkpoint_id,
        on_copied=_ignore if json_output else _echo_copied,
    )
    if json_output:
        click.echo(as_json(report))
    else:
        _echo_report(report)
    if report.damaged:
        ctx.exit(EXIT_FAILED)


@click.command(short_help="Make a replica a run of its own.")
@click.argument("run")
@store_options
@json_option
def adopt(run: str, store: str | None, config_file: Path | None, json_output: bool) -> None:
    """Make a replica that `copy` has made a run of its own, under a new uid: it can be trained from
    its newest checkpoint on, and is registered for itself. The original may go on as well.
    """
    config = configure(store, config_file)
    identity = adopt_run(config.store, run)
    if json_output:
        click.echo(as_json(identity))
        return
    ancestor = (identity.ancestors or [])[-1]
    click.echo(
        f"run {run!r} is a run of its own, uid {identity.uid}, with the first {ancestor.attempts} "
        f"attempts of {ancestor.uid}"
    )


def _ignore(checkpoint: str, size: int) -> None:
    """The report tells it."""


def _echo_copied(checkpoint: str, size: int) -> None:
    click.echo(f"{checkpoint}: copied, {readable_size(size)}")


def _echo_report(report: CopyReport) -> None:
    for one in report.left:
        click.echo(f"{one.checkpoint}: not copied: {one.why}")
    for one in report.damaged:
        click.echo(f"{one.checkpoint}: DAMAGED, not copied: {one.why}")
    click.echo(f"{report.target}: {report}")


def _option(text: str) -> tuple[str, str | int | float | bool]:
    """``NAME=VALUE``; a value that is JSON for a number or a truth is one."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.UsageError(f"--to-option {text!r} is not NAME=VALUE")
    try:
        return name, msgspec.json.decode(value, type=int | float | bool)
    except msgspec.MsgspecError:
        return name, value
