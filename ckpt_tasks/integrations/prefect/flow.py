"""`resumable_flow`: a training function as a Prefect flow that survives being killed."""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from prefect import Flow

from ckpt_tasks.config import (
    AttemptConfig,
    RegistryConfig,
    RetentionConfig,
    SaveConfig,
    ScheduleConfig,
    StoreConfig,
)
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.prefect.blocks import CheckpointStore, ModelRegistry
from ckpt_tasks.integrations.prefect.configuration import Settings
from ckpt_tasks.integrations.prefect.flow_run import current_flow_run
from ckpt_tasks.integrations.prefect.form import flow_docstring, flow_signature
from ckpt_tasks.integrations.prefect.tasks import (
    apply_retention,
    promote_checkpoint,
    publish_report,
    recover_run,
    resolve_run,
    train_run,
    verify_checkpoint,
)
from ckpt_tasks.tasks import signature_of_entrypoint
from ckpt_tasks.tasks.credentials import environment
from ckpt_tasks.tasks.form import RESUME, given_parameters
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["resumable_flow"]

_RUN_FIELDS = ("flow_name", "flow_run_id", "flow_run_name")


@dataclass(frozen=True, kw_only=True)
class _Authored:
    """What the author of a deployment fixed, and whoever triggers it cannot change."""

    signature: EntrypointSignature
    settings: Settings
    run_name: str
    python: str | None
    alias: str | None
    retries: int
    retry_delays: Sequence[float]


def resumable_flow(
    entrypoint: str,
    *,
    name: str | None = None,
    store: str | StoreConfig | CheckpointStore | None = None,
    schedule: ScheduleConfig | None = None,
    save: SaveConfig | None = None,
    retention: RetentionConfig | None = None,
    registry: RegistryConfig | ModelRegistry | None = None,
    attempt: AttemptConfig | None = None,
    nproc: int | None = None,
    run_name: str = "{flow_name}-{flow_run_id}",
    python: str | None = None,
    retries: int = 3,
    retry_delay_seconds: Sequence[float] = (10.0, 30.0, 60.0),
    alias: str | None = "verified",
) -> Flow[..., dict[str, Any]]:
    """Make a flow whose parameters are the training function's own hyperparameters.

    The steps, each a task: resolve run, recover (reports what training would start from),
    train (with retries), verify, promote (with a registry), apply retention (with rules), publish
    report.

    `store`, `schedule`, `save`, `retention`, `registry` and `attempt` default to the configuration:
    ``CKPT_TASKS_...`` and the file that ``CKPT_TASKS_CONFIG`` names. It is read when the flow runs,
    in its process, so what a worker or a deployment's job variables set there counts. What is given
    here wins, each over its whole section of the configuration; `nproc` over ``attempt.nproc``.

    Parameters
    ----------
    entrypoint
        ``package.module:train`` or ``path/to/file.py:train``, its source readable from where
        the flow is loaded; it is not imported there.
    name
        The flow's name. Default: the function's. Assign the flow to a module variable of this
        name, with underscores for anything that Python does not allow: ``serve`` looks there.
    store
        Configuration or a block; or a path or URL, which wins over ``store.url`` only. Configured
        nowhere: the folder ``checkpoints``.
    registry
        Configuration or a block. Configured nowhere: no registry.
    schedule
        When checkpoints are saved. Configured nowhere: each epoch, and at the end.
    save
        How a save is made.
    retention
        Which checkpoints are kept, from each commit on. Configured nowhere: all.
    attempt
        How attempts follow one another and end. Where the configuration leaves ``attempt.grace``
        at its default, the trainer has 20 seconds to save after a cancellation, as Prefect allows
        30 in all.
    nproc
        Ranks that train, each in a process of its own, with torchrun's environment, on the machine
        of the flow run. A retry resumes on all of them. Configured nowhere: 1.
    run_name
        Name of the training run; ``{flow_name}``, ``{flow_run_id}``, ``{flow_run_name}`` and
        hyperparameters are filled in. A name without ``{flow_run_id}`` goes on with the same
        training run in later flow runs.
    python
        Interpreter of the training process, in an environment without Prefect, say.
    retries, retry_delay_seconds
        Of the train step, for outcomes worth retrying.
    alias
        Alias that is set on the newest checkpoint once it is verified; ``None``: no such step.

    Raises
    ------
    ConfigError
        There is no such function, or an argument cannot work.
    """
    signature = signature_of_entrypoint(entrypoint, python)
    flow_name = name or signature.function.replace("_", "-")
    _check_run_name(run_name, signature)
    authored = _Authored(
        signature=signature,
        settings=Settings(
            store=store,
            registry=registry,
            schedule=schedule,
            save=save,
            retention=retention,
            attempt=attempt,
            nproc=nproc,
        ),
        run_name=run_name,
        python=python,
        alias=alias,
        retries=retries,
        retry_delays=retry_delay_seconds,
    )
    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    return Flow(
        _flow_function(authored, flow_name, module),
        name=flow_name,
        persist_result=False,
    )


def _flow_function(
    authored: _Authored, flow_name: str, module: str
) -> Callable[..., dict[str, Any]]:
    def train(**parameters: Any) -> dict[str, Any]:
        with environment(authored.settings.credentials()):
            return _execute(authored, flow_name, parameters)

    # Prefect finds a flow again by the module and the name of its function.
    train.__name__ = train.__qualname__ = re.sub(r"\W", "_", flow_name)
    train.__module__ = module
    train.__doc__ = flow_docstring(authored.signature)
    train.__signature__ = flow_signature(authored.signature)  # type: ignore[attr-defined]
    return train


def _execute(authored: _Authored, flow_name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    resume = parameters.pop(RESUME)
    spec = resolve_run(
        authored.signature.entrypoint,
        _run_name(authored.run_name, flow_name, parameters),
        given_parameters(authored.signature.hyperparameters, parameters),
        authored.settings.resolve(),
        resume,
        authored.python,
    )
    recover_run(spec)
    try:
        result = _train_and_verify(authored, spec)
    except Exception:
        publish_report(spec, return_state=True)
        raise
    publish_report(spec)
    return result


def _train_and_verify(authored: _Authored, spec: TrainSpec) -> dict[str, Any]:
    train = train_run.with_options(
        retries=authored.retries, retry_delay_seconds=list(authored.retry_delays)
    )
    outcome = train(spec)
    verified = verify_checkpoint(spec)
    if authored.alias is not None and spec.config.registry.tracking_uri is not None:
        # A state, not its value: a registry that stays away fails no training that is complete.
        promote_checkpoint(spec, verified.checkpoint, authored.alias, return_state=True)
    if not spec.config.retention.keeps_everything:
        apply_retention(spec, return_state=True)  # likewise: the next one does what is left
    result: dict[str, Any] = msgspec.to_builtins(outcome)
    return result


def _run_name(template: str, flow_name: str, parameters: Mapping[str, Any]) -> str:
    flow_run = current_flow_run()
    return template.format(
        **{
            **parameters,
            "flow_name": flow_name,
            "flow_run_id": flow_run.id,
            "flow_run_name": flow_run.name,
        }
    )


def _check_run_name(template: str, signature: EntrypointSignature) -> None:
    known = [*_RUN_FIELDS, *(h.name for h in signature.hyperparameters)]
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(f"run_name={template!r} is no template: {error}") from error
    for field in fields:
        if field is not None and field not in known:
            raise ConfigError(
                f"run_name={template!r} names {{{field}}}; it may use "
                f"{', '.join(f'{{{name}}}' for name in known)}"
            )
