"""The form from which people trigger a flow: the training function's own hyperparameters.

Prefect derives a deployment's form from the signature and the Google-style docstring of the
flow's function, so both are made here, from what `read_signature` found in the source.
"""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Annotated, Any

from pydantic import Field

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.tasks.form import RESUME, RESUME_HELP, RESUME_PATTERN, form_help
from ckpt_tasks.training.entrypoints.entrypoint import EntrypointSignature, Hyperparameter

__all__ = ["flow_docstring", "flow_signature"]

_RESUME_TYPE = Annotated[str, Field(pattern=RESUME_PATTERN)]
_RESERVED = (RESUME, "return_state", "wait_for")


def flow_signature(signature: EntrypointSignature) -> Signature:
    """Keyword-only parameters: the hyperparameters in their order, then `resume`.

    What a function takes as ``**kwargs`` has no place in a form.

    Raises
    ------
    ConfigError
        A hyperparameter has a name that the flow needs for itself.
    """
    for hyperparameter in signature.hyperparameters:
        if hyperparameter.name in _RESERVED:
            raise ConfigError(
                f"{signature.entrypoint}: a flow cannot have a hyperparameter named "
                f"{hyperparameter.name!r}; rename it"
            )
    parameters = [_parameter(hyperparameter) for hyperparameter in signature.hyperparameters]
    resume = Parameter(RESUME, Parameter.KEYWORD_ONLY, default="auto", annotation=_RESUME_TYPE)
    return Signature([*parameters, resume], return_annotation=dict[str, Any])


def flow_docstring(signature: EntrypointSignature) -> str:
    """Summary and parameters, in the style that Prefect reads."""
    lines = [signature.summary or f"Train {signature.entrypoint}, resumably.", "", "Args:"]
    for hyperparameter in signature.hyperparameters:
        lines.append(f"    {hyperparameter.name}: {form_help(hyperparameter)}")
    lines.append(f"    {RESUME}: {RESUME_HELP}")
    return "\n".join(lines)


def _parameter(hyperparameter: Hyperparameter) -> Parameter:
    annotation = hyperparameter.annotation
    default: Any = hyperparameter.default
    if hyperparameter.required:
        default = Parameter.empty
    elif not hyperparameter.default_known and annotation is not Any:
        annotation = annotation | None
    return Parameter(
        hyperparameter.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
