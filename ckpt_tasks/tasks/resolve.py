"""Step 1: turn what was asked for into a spec that can work, or say at once why it cannot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.training.entrypoints.entrypoint import (
    EntrypointSignature,
    check_params,
    read_signature,
)
from ckpt_tasks.training.entrypoints.source import interpreter_path
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import CheckpointId

__all__ = ["resolve", "signature_of_entrypoint"]


def resolve(
    entrypoint: str,
    *,
    run: str,
    params: Mapping[str, Any],
    config: CheckpointConfig,
    invocation: str,
    resume: str = "auto",
    tags: Mapping[str, str] | None = None,
    python: str | None = None,
    recorded_as: str | None = None,
    folders: Sequence[str] = (),
) -> TrainSpec:
    """Check everything that can be checked before a training process is started.

    Parameters
    ----------
    entrypoint
        ``package.module:function`` of the training function; its source is read, not imported.
    run
        Name of the training run.
    params
        Hyperparameters for the function.
    config
        Store, schedule, registry and attempts, the ranks that they train on among them.
    invocation
        The orchestrator's id of this execution; all its retries share it.
    resume
        ``auto``, ``fresh`` or a checkpoint's id.
    tags
        Ids of the orchestrator, for attempts and the registry.
    python
        Interpreter of the training process; default: this one.
    recorded_as
        What records call the entry point; default: as it is.
    folders
        Where the training's code may lie, besides the working directory and Python's path.

    Raises
    ------
    ConfigError
        The function, a hyperparameter, the run's name, `resume`, the interpreter or the store
        is wrong; a retry changes nothing.
    StoreError
        Storage did not answer.
    """
    RunLayout(run)
    _check_resume(resume)
    checked = check_params(signature_of_entrypoint(entrypoint, python, folders), params)
    open_store(config.store, for_writing=True).close()
    return TrainSpec(
        entrypoint=entrypoint,
        run=run,
        params=checked,
        config=config,
        resume=resume,
        invocation=invocation,
        tags=dict(tags or {}),
        python=python,
        recorded_as=recorded_as,
        folders=list(folders),
        nproc=config.attempt.nproc,
    )


def signature_of_entrypoint(
    entrypoint: str, python: str | None, folders: Sequence[str] = ()
) -> EntrypointSignature:
    """What the training function takes, read where the interpreter that trains finds it.

    Parameters
    ----------
    entrypoint
        ``package.module:function`` or ``path/to/file.py:function``.
    python
        The interpreter that trains; ``None`` for this one.
    folders
        As `resolve` takes them.

    Raises
    ------
    ConfigError
        No such function, or the interpreter cannot be run.
    """
    return read_signature(
        entrypoint,
        folders=[os.getcwd(), *folders],
        search_path=interpreter_path(python) if python else (),
    )


def _check_resume(resume: str) -> None:
    if resume in ("auto", "fresh"):
        return
    try:
        CheckpointId.parse(resume)
    except ValueError as error:
        raise ConfigError(f"resume takes 'auto', 'fresh' or a checkpoint's id: {error}") from error
