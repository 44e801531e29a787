"""State dicts of optimizers, restored bit by bit.

``Optimizer.load_state_dict`` casts floating-point state to its parameter's dtype, rebuilds
iterables (text among them) element by element, and copies tensor options. What it changed is put
back afterwards.
"""

from __future__ import annotations

from typing import Any

import torch

from ckpt_tasks.errors import StateError

__all__ = ["PARAM_SHAPES", "load_optimizer", "optimizer_state_dict", "plain_optimizer_state"]

PARAM_SHAPES = "param_shapes"
"""Member added to an optimizer's state dict: its parameters' shapes, group by group, so that
state is not restored to other parameters than it was saved from."""


def optimizer_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's own state dict, with the shapes of its parameters.

    An optimizer that has not stepped is saved as such.
    """
    shapes = [
        [list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups
    ]
    return {**optimizer.state_dict(), PARAM_SHAPES: shapes}


def plain_optimizer_state(state: Any) -> Any:
    """What `optimizer_state_dict` returned, as torch has it; any other state as it is."""
    if not isinstance(state, dict) or not {"param_groups", PARAM_SHAPES} <= state.keys():
        return state
    return {key: value for key, value in state.items() if key != PARAM_SHAPES}


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load what `optimizer_state_dict` returned, exactly.

    Parameters
    ----------
    name
        The tracked name, for messages.
    optimizer
        The live optimizer; whether it has stepped does not matter.
    state
        The saved state. Its tensors become the optimizer's own where dtype and device fit.

    Raises
    ------
    StateError
        Other parameter groups, or parameters of other shapes.
    """
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise StateError(f"{name} is an optimizer, but what was saved under it is not one's state")
    own = plain_optimizer_state(state)
    _check_groups(name, optimizer, state)
    try:
        optimizer.load_state_dict(own)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StateError(f"{name}: the saved state does not fit this optimizer: {error}") from error
    _put_exact_state(optimizer, own)
    _put_exact_options(optimizer, own)


def _check_groups(name: str, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    groups, saved = optimizer.param_groups, state["param_groups"]
    if len(groups) != len(saved):
        raise StateError(
            f"{name} was saved with {len(saved)} parameter groups and has {len(groups)} now; "
            "build the same groups before it is tracked"
        )
    for i, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(saved_group["params"]):
            raise StateError(
                f"{name}: parameter group {i} was saved with {len(saved_group['params'])} "
                f"parameters and has {len(group['params'])} now"
            )
    _check_shapes(name, optimizer, state.get(PARAM_SHAPES))


def _check_shapes(name: str, optimizer: torch.optim.Optimizer, shapes: Any) -> None:
    if shapes is None:
        return
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, shapes, strict=True)):
        for j, (parameter, shape) in enumerate(zip(group["params"], saved, strict=True)):
            if list(parameter.shape) != shape:
                raise StateError(
                    f"{name}: parameter {j} of group {i} was saved with shape {shape} and has "
                    f"{list(parameter.shape)} now; pass the parameters in the same order, of the "
                    "same model"
                )


def _put_exact_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    live_of = {
        saved_id: parameter
        for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True)
        for parameter, saved_id in zip(group["params"], saved_group["params"], strict=True)
    }
    for saved_id, values in saved["state"].items():
        key = live_of.get(saved_id, saved_id)
        if key in optimizer.state:
            optimizer.state[key] = _exact(values, optimizer.state[key])


def _put_exact_options(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for option, value in saved_group.items():
            # The saved tensor itself, not load_state_dict's copy: a scheduler may share it.
            if option != "params" and isinstance(value, torch.Tensor):
                group[option] = value


def _exact(saved: Any, live: Any) -> Any:
    """`live`, or `saved` where loading has changed it; on the device that loading chose."""
    if isinstance(saved, torch.Tensor):
        if not isinstance(live, torch.Tensor):
            return saved
        same = live.dtype is saved.dtype and live.shape == saved.shape
        return live if same else saved.to(live.device)
    if type(saved) is dict and isinstance(live, dict):
        for key, value in saved.items():
            live[key] = _exact(value, live.get(key))
        return live
    if type(saved) in (list, tuple) and type(live) is type(saved) and len(live) == len(saved):
        return type(saved)(_exact(a, b) for a, b in zip(saved, live, strict=True))
    # A tensor for a number is the optimizer's own upgrade of an older state.
    return live if isinstance(live, torch.Tensor) else saved
