"""``demo``: the main job, live."""

from __future__ import annotations

import importlib

import click

from ckpt_tasks.errors import ConfigError

__all__ = ["demo"]

_NEEDED = {"mlflow", "prefect", "sklearn", "torch", "torchdata"}


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Train under Prefect, be killed twice, resume, and prove that nothing changed."""
    try:
        code = importlib.import_module("ckpt_tasks.demo").main(list(arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        raise ConfigError(
            f"the demo needs {error.name}, which is not installed: pip install 'ckpt-tasks[demo]'"
        ) from error
    ctx.exit(code)
