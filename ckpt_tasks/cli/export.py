"""``export``: a checkpoint in a form that others open."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click

from ckpt_tasks.cli.browse import find_checkpoint, find_run
from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    split_checkpoint,
    split_params,
    store_options,
)
from ckpt_tasks.cli.tables import echo
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import open_existing_store
from ckpt_tasks.tasks.export import ExportReport, export_formats
from ckpt_tasks.tasks.export import export as export_checkpoint
from ckpt_tasks.tasks.exporting import ExportRequest, ServedModel

__all__ = ["export"]


@click.command(short_help="Write a checkpoint as safetensors, for torch.load, as an MLflow model.")
@click.argument("run", metavar="RUN[@ID]")
@click.option(
    "--to",
    required=True,
    type=click.Choice(export_formats()),
    help="The form.",
)
@click.option(
    "--output",
    required=True,
    metavar="PATH",
    help="Where nothing is yet: for torch a file, else a folder.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="A tracked name; repeatable. Default: for torch all, else the modules.",
)
@click.option(
    "--model",
    "entrypoint",
    metavar="MODULE:FUNCTION",
    help="Of an MLflow model: what returns the module, also file.py:FUNCTION.",
)
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    help="An argument for it; repeatable. Default: the run's hyperparameter of that name.",
)
@click.option(
    "--example", metavar="FILE.npy", help="Inputs, for an MLflow model's signature and example."
)
@click.option(
    "--requirement",
    "requirements",
    multiple=True,
    metavar="SPEC",
    help="What an MLflow model needs beside torch and this package, as pip takes it; repeatable.",
)
@store_options
@json_option
def export(
    run: str,
    to: str,
    output: str,
    only: Sequence[str],
    entrypoint: str | None,
    params: Sequence[str],
    example: str | None,
    requirements: Sequence[str],
    store: str | None,
    config_file: Path | None,
    json_output: bool,
) -> None:
    """Write a checkpoint in a form that others open, every byte verified.

    \b
    safetensors   a folder with NAME.safetensors for each module, tensors whole; needs no torch
    torch         a file for torch.load(PATH, weights_only=True): {NAME: state}, optimizers too
    mlflow-model  a folder for mlflow.pyfunc.load_model; weights in safetensors, no pickle

    Without @ID, the newest one that a retry would start from. What is written appears whole, or
    not at all.
    """  # noqa: D301 - \b is click's, for lines that stay as they are
    name, checkpoint_id = split_checkpoint(run)
    config = configure(store, config_file).store
    with closing(open_existing_store(config)) as opened:
        view = find_run(opened, name)
        if checkpoint_id is not None:
            find_checkpoint(view, checkpoint_id)
    request = ExportRequest(
        only=list(only), model=_model(entrypoint, params, example, requirements)
    )
    report = export_checkpoint(config, name, to, output, checkpoint=checkpoint_id, request=request)
    click.echo(as_json(report)) if json_output else _echo_report(report)


def _model(
    entrypoint: str | None,
    params: Sequence[str],
    example: str | None,
    requirements: Sequence[str],
) -> ServedModel | None:
    if entrypoint is not None:
        return ServedModel(
            entrypoint=entrypoint,
            params=dict(split_params(params)),
            example=example,
            requirements=list(requirements),
        )
    if params or example or requirements:
        raise ConfigError("-p, --example and --requirement are about a --model MODULE:FUNCTION")
    return None


def _echo_report(report: ExportReport) -> None:
    what = f"{', '.join(report.names)} of {report.checkpoint}"
    size = readable_size(report.size)
    echo(f"exported {what} to {report.output} ({report.to}, {size})")
