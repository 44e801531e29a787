"""``demo``: the main job, live."""

from __future__ import annotations

import importlib.util

import click

from ckpt_tasks.errors import ConfigError

__all__ = ["demo"]

_NEEDED = ("mlflow", "prefect", "sklearn", "torch", "torchdata")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Train under Prefect, be killed twice, resume, and prove it."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {', '.join(missing)}, not installed here: "
            "pip install 'ckpt-tasks[demo]'"
        )
    from ckpt_tasks.demo import main

    ctx.exit(main(list(arguments)))
