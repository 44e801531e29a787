"""``verify``: prove that checkpoints are whole."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from ckpt_tasks.checkpointer.catalog import RunView
from ckpt_tasks.checkpointer.verify import VerifyReport
from ckpt_tasks.cli.browse import find_checkpoint, find_run
from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    split_checkpoint,
    store_options,
)
from ckpt_tasks.cli.tables import echo
from ckpt_tasks.errors import CheckpointNotFoundError, UnsupportedFormatError
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import open_existing_store
from ckpt_tasks.tasks.verify import verify_and_mark
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["verify"]


@click.command(short_help="Read every byte of a checkpoint, and check it.")
@click.argument("run", metavar="RUN[@ID]")
@click.option("--all", "every", is_flag=True, help="Every checkpoint, not only the newest valid.")
@store_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    run: str,
    every: bool,
    store: str | None,
    config_file: Path | None,
    json_output: bool,
) -> None:
    """Read every byte of a checkpoint and compare it with what was committed.

    Without @ID, the newest one that a retry would start from. What is whole is marked so, and need
    not be read again before older ones are collected. Exits with 1 when a checkpoint is damaged.
    """
    name, checkpoint_id = split_checkpoint(run)
    if checkpoint_id is not None and every:
        raise click.UsageError("@ID names one checkpoint, --all asks for every one: choose")
    reports = []
    later: UnsupportedFormatError | None = None
    with closing(open_existing_store(configure(store, config_file).store)) as opened:
        view = find_run(opened, name)
        for chosen in _choose(view, checkpoint_id, every=every):
            try:
                report = verify_and_mark(opened, view, chosen)
            except UnsupportedFormatError as error:
                later = error  # one of a later version must not keep the others unverified
                continue
            reports.append(report)
            if not json_output:
                _echo_report(report)
    if json_output and (reports or later is None):
        click.echo(as_json(reports))
    if not all(report.ok for report in reports):
        ctx.exit(EXIT_FAILED)
    if later is not None:
        raise later


def _choose(view: RunView, checkpoint_id: str | None, *, every: bool) -> list[str]:
    if checkpoint_id is not None:
        return [find_checkpoint(view, checkpoint_id).id]
    if every:
        return [checkpoint.id for checkpoint in view.checkpoints]
    if view.newest is None:
        raise CheckpointNotFoundError(
            f"{view.run.run} has no checkpoint that a retry could start from; "
            "--all verifies those that it has"
        )
    return [view.newest.id]


def _echo_report(report: VerifyReport) -> None:
    speed = round(report.size / report.seconds) if report.seconds > 0 else 0
    read = f"{report.files} files, {readable_size(report.size)} in {report.seconds:.2f} s"
    if report.ok:
        echo(f"ok       {report.checkpoint}  {read}, {readable_size(speed)}/s")
        if report.unmarked is not None:
            echo(f"         not marked as verified: {report.unmarked}", err=True)
    else:
        echo(f"DAMAGED  {report.checkpoint}  {report.problem}")
