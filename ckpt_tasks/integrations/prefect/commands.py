"""``ckpt-tasks prefect ...``, found by the command line through an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

import click

__all__ = ["prefect"]

_SET_URL = "set PREFECT_API_URL to the server's, such as http://127.0.0.1:4200/api"
_CHECK_URL = (
    "does the URL end in /api, and is there a PREFECT_API_KEY or PREFECT_API_AUTH_STRING where it "
    "wants one?"
)


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

    with _server_problems():
        installed = install_automations(heartbeat_timeout=heartbeat_timeout)
    for name, what in installed.items():
        click.echo(f"{what:>9}  {name}")


@contextmanager
def _server_problems() -> Iterator[None]:
    """Say which server did not do its part, and what to look at, instead of httpx's own words.

    Raises
    ------
    CkptTasksError
        It does not answer, or refuses.
    ConfigError
        None is named.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    from ckpt_tasks.errors import CkptTasksError, ConfigError
    from ckpt_tasks.masking import mask_url

    url = PREFECT_API_URL.value()
    if not url and not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        raise ConfigError(f"no Prefect server is named: {_SET_URL}")
    server = f"the Prefect server of PREFECT_API_URL = {mask_url(url or '(not set)')}"
    try:
        yield
    except httpx.HTTPStatusError as error:
        answer = f"{error.response.status_code} {error.response.reason_phrase}"
        raise CkptTasksError(f"{server} answered {answer}: {_CHECK_URL}") from error
    except JSONDecodeError as error:
        raise CkptTasksError(f"{server} answered with a page: {_CHECK_URL}") from error
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise CkptTasksError(
            f"{server} does not answer ({why}): start it with 'prefect server start', or {_SET_URL}"
        ) from error
