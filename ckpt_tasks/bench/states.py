"""States of known shapes to save and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.suggest import did_you_mean

__all__ = ["STATES", "make_state"]

_GPT = {"vocabulary": 50257, "context": 1024, "width": 768, "layers": 12}
_MLP_WIDTH, _MLP_LAYERS = 1768, 8
_MANY, _MANY_ELEMENTS = 3000, 8333


def make_state(name: str) -> dict[str, Any]:
    """Tracked name to object: a model, and an optimizer that has made a step.

    Raises
    ------
    ConfigError
        There is no state of this name.
    """
    if name not in STATES:
        raise ConfigError(f"no state {name!r}; {did_you_mean(name, STATES, what='states')}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STATES[name]()


def _gpt() -> dict[str, Any]:
    """The parameters of GPT-2 small (Radford et al., 2019), with AdamW: 1.5 GB."""
    width, shapes = _GPT["width"], dict[str, tuple[int, ...]]()
    shapes["wte"], shapes["wpe"] = (_GPT["vocabulary"], width), (_GPT["context"], width)
    for layer in range(_GPT["layers"]):
        for part, (rows, columns) in {
            "attention": (3 * width, width),
            "projection": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }.items():
            shapes[f"{layer}_{part}_weight"] = (rows, columns)
            shapes[f"{layer}_{part}_bias"] = (rows,)
        for norm in ("first", "second"):
            shapes[f"{layer}_{norm}_weight"] = shapes[f"{layer}_{norm}_bias"] = (width,)
    return _with_adamw(shapes)


def _mlp() -> dict[str, Any]:
    """A plain network with AdamW: 300 MB."""
    square = (_MLP_WIDTH, _MLP_WIDTH)
    return _with_adamw({f"layer_{number}": square for number in range(_MLP_LAYERS)})


def _many() -> dict[str, Any]:
    """3,000 small tensors: 100 MB."""
    return {"model": _module({f"part_{n}": (_MANY_ELEMENTS,) for n in range(_MANY)})}


def _module(shapes: Mapping[str, tuple[int, ...]]) -> nn.ParameterDict:
    return nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})


def _with_adamw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    model = _module(shapes)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"model": model, "optimizer": optimizer}


STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-1.5GB": _gpt,
    "mlp-300MB": _mlp,
    "many-100MB": _many,
}
"""Name to maker."""
