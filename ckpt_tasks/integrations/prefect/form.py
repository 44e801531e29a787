"""The form from which people trigger a flow: the training function's own hyperparameters.

Prefect derives a deployment's form from the signature and the Google-style docstring of the
flow's function, so both are made here, from what `read_signature` found in the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from typing import Annotated, Any

from pydantic import Field

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.training.entrypoint import EntrypointSignature, Hyperparameter
from ckpt_tasks.types import CHECKPOINT_ID

__all__ = ["RESUME", "flow_docstring", "flow_signature", "given_parameters"]

RESUME = "resume"

_RESUME_TYPE = Annotated[str, Field(pattern=rf"^(auto|fresh|{CHECKPOINT_ID.pattern})$")]
_RESUME_HELP = (
    "Where the first attempt starts: 'auto' (the newest checkpoint), 'fresh' (the beginning), or "
    "a checkpoint's id. Retries always go on from the newest."
)
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
        lines.append(f"    {hyperparameter.name}: {_help(hyperparameter)}")
    lines.append(f"    {RESUME}: {_RESUME_HELP}")
    return "\n".join(lines)


def given_parameters(
    hyperparameters: Iterable[Hyperparameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values to pass on: ``None`` for a default that only the code knows is left out."""
    unknown = {h.name for h in hyperparameters if not h.required and not h.default_known}
    return {
        name: value for name, value in values.items() if not (name in unknown and value is None)
    }


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


def _help(hyperparameter: Hyperparameter) -> str:
    if hyperparameter.required or hyperparameter.default_known:
        return hyperparameter.description
    return f"{hyperparameter.description} (Left empty: the function's own default.)".strip()
