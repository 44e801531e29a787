"""What a form says from which people trigger a training, whichever orchestrator shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_tasks.training.entrypoints.entrypoint import Hyperparameter
from ckpt_tasks.types import CHECKPOINT_ID

__all__ = ["RESUME", "RESUME_HELP", "RESUME_PATTERN", "form_help", "given_parameters"]

RESUME = "resume"
"""Name of the field that says where the first attempt starts."""

RESUME_PATTERN = rf"^(auto|fresh|{CHECKPOINT_ID.pattern})$"

RESUME_HELP = (
    "Where the first attempt starts: 'auto' (the newest checkpoint), 'fresh' (the beginning), or "
    "a checkpoint's id, of the same training run. Retries always go on from the newest."
)


def form_help(hyperparameter: Hyperparameter) -> str:
    """What the form says below the field of a hyperparameter."""
    if hyperparameter.required or hyperparameter.default_known:
        return hyperparameter.description
    return f"{hyperparameter.description} (Left empty: the function's own default.)".strip()


def given_parameters(
    hyperparameters: Iterable[Hyperparameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values to pass on: ``None`` for a default that only the code knows is left out."""
    unknown = {h.name for h in hyperparameters if not h.required and not h.default_known}
    return {
        name: value for name, value in values.items() if not (name in unknown and value is None)
    }
