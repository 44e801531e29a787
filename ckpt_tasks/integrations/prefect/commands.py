"""``ckpt-tasks prefect ...``, found by the command line through an entry point."""

from __future__ import annotations

import click

__all__ = ["prefect"]


@click.group()
def prefect() -> None:
    """Set up a Prefect server for resumable training."""


@prefect.command("install-automations")
@click.option(
    "--heartbeat-timeout",
    type=float,
    default=90.0,
    show_default=True,
    metavar="SECONDS",
    help="A flow run without a heartbeat for so long counts as crashed.",
)
def install_automations_command(heartbeat_timeout: float) -> None:
    """Make crashed flow runs go on under the same id.

    Works on the server that PREFECT_API_URL or the current profile names. Calling it again
    changes nothing. Only flow runs with the tag "ckpt-tasks" are looked after.
    """
    from ckpt_tasks.integrations.prefect.automations import install_automations

    for name, what in install_automations(heartbeat_timeout=heartbeat_timeout).items():
        click.echo(f"{what:>9}  {name}")
