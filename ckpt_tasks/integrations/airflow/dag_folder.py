"""Training code that lies beside a DAG file: Airflow finds it there, and so does the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from airflow.sdk import DAG, Context

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.tasks.resolve import signature_of_entrypoint
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature

__all__ = ["code_folders", "dag_file", "signature_at_parse"]

_HERE = __name__.rpartition(".")[0]


def dag_file() -> str:
    """The file that is being parsed: of the first caller outside this integration.

    Airflow takes the file that makes the ``DAG`` for it, which a factory does elsewhere.
    """
    frame = sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(_HERE):
        frame = frame.f_back
    return frame.f_code.co_filename


def signature_at_parse(entrypoint: str, python: str | None, file: str) -> EntrypointSignature:
    """What the training function takes, for the trigger form.

    Found by this interpreter first. Only where it has no such function the one that trains is
    asked: it need not exist where DAGs are parsed, and starting it takes time at each parse. The
    step ``resolve`` reads what will be trained.

    Raises
    ------
    ConfigError
        Neither finds it.
    """
    folders = [str(Path(file).parent)]
    try:
        return signature_of_entrypoint(entrypoint, None, folders)
    except ConfigError:
        if python is None:
            raise
        return signature_of_entrypoint(entrypoint, python, folders)


def code_folders(dag: DAG, context: Context) -> list[str]:
    """The DAG file's folder, and the root of its bundle, from which Airflow imports modules."""
    bundle = getattr(context["ti"], "bundle_instance", None)
    folders = [str(Path(dag.fileloc).parent), *([str(bundle.path)] if bundle else ())]
    return list(dict.fromkeys(folders))
