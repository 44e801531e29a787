"""``demo``: the main job, live."""

from __future__ import annotations

import importlib.util

import click

from ckpt_tasks.errors import ConfigError

__all__ = ["demo"]

_TRAINING = ("mlflow", "sklearn", "torch", "torchdata")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Train, be killed twice, resume, and prove it."""
    airflow = "--airflow" in arguments
    needed = (*_TRAINING, "airflow" if airflow else "prefect")
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        extras = "airflow,mlflow,torch]' scikit-learn" if airflow else "demo]'"
        raise ConfigError(
            f"the demo needs {', '.join(missing)}, not installed here: "
            f"pip install 'ckpt-tasks[{extras}"
        )
    from ckpt_tasks.demo.show import main

    ctx.exit(main(list(arguments)))
