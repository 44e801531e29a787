"""States of known shapes to save and load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.suggest import did_you_mean

__all__ = ["STATES", "advance", "check_state", "freeze", "make_state", "train"]

_GPT = {"vocabulary": 50257, "context": 1024, "width": 768, "layers": 12}
_MLP_WIDTH, _MLP_LAYERS = 1768, 8
_MANY, _MANY_ELEMENTS = 3000, 8333
_PARTS = 8  # tensors that are trained beside frozen ones

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB|TB)", re.IGNORECASE)
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_ADAM_BYTES = 3 * 4  # of a parameter in single precision, and of AdamW's two moments of it


def check_state(name: str) -> None:
    """Raise `ConfigError` where `make_state` would, before anything is measured."""
    if name not in STATES and _SIZE.fullmatch(name) is None:
        raise ConfigError(
            f"no state {name!r}; {did_you_mean(name, STATES, what='states')}; or a size, as in 2GB"
        )


def make_state(name: str) -> dict[str, Any]:
    """Tracked name to object: a model, and an optimizer that has made a step.

    Parameters
    ----------
    name
        One of `STATES`, or a size such as ``2GB``: a GPT-like state of about that many bytes.

    Raises
    ------
    ConfigError
        There is no state of this name.
    """
    check_state(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in STATES:
            return STATES[name]()
        match = _SIZE.fullmatch(name)
        assert match is not None
        return _gpt_of(float(match[1]) * _UNITS[match[2].lower()])


def advance(tensors: Iterable[torch.Tensor]) -> None:
    """Change every element, as training does: an incremental save finds nothing to refer to."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1e-3)


def freeze(items: Mapping[str, Any], trained: float) -> dict[str, Any]:
    """A model that is frozen but for a few new parameters, and their optimizer.

    Parameters
    ----------
    items
        Whose model is frozen; it is used, not copied.
    trained
        The share of all parameters that is trained.
    """
    frozen: nn.ParameterDict = items["model"]
    elements = sum(parameter.numel() for parameter in frozen.values())
    part = max(1, round(elements * trained / (1 - trained) / _PARTS))
    adapters = _module({f"adapter_{number}": (part,) for number in range(_PARTS)})
    model = nn.ModuleDict({"frozen": frozen, "adapters": adapters})
    optimizer = torch.optim.AdamW(adapters.parameters())
    train(optimizer)
    return {"model": model, "optimizer": optimizer}


def train(optimizer: torch.optim.Optimizer) -> None:
    """A step on made-up gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gpt() -> dict[str, Any]:
    """The parameters of GPT-2 small (Radford et al., 2019), with AdamW: 1.5 GB."""
    return _with_adamw(_gpt_shapes(**_GPT))


def _gpt_of(size: float) -> dict[str, Any]:
    """The same architecture, as wide as makes `size` bytes.

    The embedding grows with the width: its share of the parameters stays GPT-2 small's.
    """
    layers, rows = _GPT["layers"], round(_GPT["vocabulary"] / _GPT["width"])
    squares = layers * 12 + rows + 1  # matrices of width x width that all of it amounts to
    width = max(1, round((size / _ADAM_BYTES / squares) ** 0.5))
    return _with_adamw(_gpt_shapes(rows * width, width, width, layers))


def _gpt_shapes(
    vocabulary: int, context: int, width: int, layers: int
) -> dict[str, tuple[int, ...]]:
    shapes = dict[str, tuple[int, ...]]()
    shapes["wte"], shapes["wpe"] = (vocabulary, width), (context, width)
    for layer in range(layers):
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
    return shapes


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
    train(optimizer)
    return {"model": model, "optimizer": optimizer}


STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-1.5GB": _gpt,
    "mlp-300MB": _mlp,
    "many-100MB": _many,
}
"""Name to maker."""
