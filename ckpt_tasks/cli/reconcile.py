"""``reconcile``: make store and registry agree after any outage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    registry_options,
    registry_overrides,
    store_options,
)
from ckpt_tasks.cli.tables import echo, table
from ckpt_tasks.tasks.differences import Difference
from ckpt_tasks.tasks.reconcile import ReconcileReport
from ckpt_tasks.tasks.reconcile import reconcile as reconcile_run
from ckpt_tasks.tasks.reconcile_all import reconcile_all
from ckpt_tasks.types import EXIT_FAILED

__all__ = ["reconcile"]


@click.command(short_help="Make store and registry agree after any outage.")
@click.argument("run", required=False)
@click.option("--grace", metavar="DURATION", help="How long unneeded bytes stay. Default: 1h.")
@registry_options
@store_options
@click.option("--dry-run", is_flag=True, help="Change nothing; print the plan.")
@json_option
@click.pass_context
def reconcile(
    ctx: click.Context,
    /,
    run: str | None,
    grace: str | None,
    store: str | None,
    config_file: Path | None,
    dry_run: bool,
    json_output: bool,
    **flags: Any,
) -> None:
    """Make MLflow hold of RUN what the store has, and remove what nothing needs any more.

    Without RUN, of every run of the store. What is committed gets registered, with aliases and
    metrics; what is registered and gone is deleted there; a run that MLflow has lost is made anew
    from the store; one whose attempt is dead no longer counts as running. A run that is being
    trained is left alone, and waiting for its heartbeat may take a minute. Repeated, it changes
    nothing.

    Exits with 1 where something went wrong: what was done stays done, and it is worth repeating.
    """
    overrides = {"retention.grace": grace, **registry_overrides(flags)}
    config = configure(store, config_file, overrides)
    if config.registry.tracking_uri is None:
        echo("no registry is configured: only unneeded bytes are looked for", err=True)
    if run is not None:
        reports = [reconcile_run(config, run, dry_run=dry_run, tell=_tell)]
    else:
        reports = reconcile_all(config, dry_run=dry_run, tell=_tell)
    if json_output:
        click.echo(as_json(reports if run is None else reports[0]))
    else:
        for report in reports:
            _echo_report(report)
    if any(report.problem is not None for report in reports):
        ctx.exit(EXIT_FAILED)


def _tell(sentence: str) -> None:
    echo(sentence, err=True)


def _echo_report(report: ReconcileReport) -> None:
    echo(report)
    if report.changes:
        done = "to do" if report.dry_run else "done"
        _echo_differences(report.changes, done)
    if report.left:
        _echo_differences(report.left, "left to do")
    for note in report.notes:
        echo(f"  {note}")


def _echo_differences(differences: list[Difference], done: str) -> None:
    rows = [[d.kind, d.what, d.why, d.action] for d in differences]
    for line in table(["kind", "what", "why", done], rows):
        echo(f"  {line}")
