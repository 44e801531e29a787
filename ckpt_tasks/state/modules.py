"""State dicts of modules under names that do not depend on how the module is wrapped.

``torch.compile`` puts ``_orig_mod.`` and (Distributed)DataParallel ``module.`` before the names
of what they wrap, anywhere in a tree of modules and in any order. Which prefixes those are is
read off the live module, never off the text of a name: an ``AveragedModel`` has a submodule of
its own called ``module``, whose name stays.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ckpt_tasks.errors import StateError

__all__ = ["canonical_state_dict", "canonical_tensors", "load_module", "parameter_names"]


def canonical_state_dict(module: nn.Module) -> Any:
    """``module.state_dict()`` with the prefixes of wrappers left out, metadata included."""
    state = module.state_dict()
    prefixes = _wrapper_prefixes(module)
    return _renamed(state, prefixes) if prefixes else state


def canonical_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name to the live parameter or buffer itself."""
    prefixes = _wrapper_prefixes(module)
    return {
        _canonical(raw, prefixes): value
        for raw, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }


def load_module(name: str, module: nn.Module, state: Any) -> None:
    """Load a canonical state dict into a module, wrapped or not, strictly.

    Parameters
    ----------
    name
        The tracked name, for messages.
    module
        The live module.
    state
        As `canonical_state_dict` returned it, possibly for another wrapping.

    Raises
    ------
    StateError
        Missing or unexpected names, another shape or dtype.
    """
    if not isinstance(state, dict):
        raise StateError(f"{name} is a module, but a {type(state).__name__} was saved under it")
    saved: dict[str, Any] = state
    live = module.state_dict()
    prefixes = _wrapper_prefixes(module)
    raw_names = {_canonical(raw, prefixes): raw for raw in live} if prefixes else {}
    raw_state: OrderedDict[str, Any] = OrderedDict(
        (raw_names.get(key, key), value) for key, value in saved.items()
    )
    _check_dtypes(name, live, raw_state)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        raw_state._metadata = _raw_metadata(metadata, live, prefixes)  # type: ignore[attr-defined]
    try:
        module.load_state_dict(raw_state, strict=True)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise StateError(f"{name}: the saved state does not fit this module: {error}") from error


def parameter_names(module: nn.Module) -> frozenset[str]:
    """Canonical names of its parameters; buffers are none."""
    prefixes = _wrapper_prefixes(module)
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(_canonical(raw, prefixes) for raw, _ in named)


def _wrapper_prefixes(module: nn.Module) -> frozenset[str]:
    """Raw prefixes, dot included, whose last component a wrapper has added."""
    wrappers = _wrapper_types()
    if not any(isinstance(part, tuple(wrappers)) for part in module.modules()):
        return frozenset()
    return frozenset(
        f"{path}.{component}." if path else f"{component}."
        for path, part in module.named_modules(remove_duplicate=False)
        for wrapper, component in wrappers.items()
        if isinstance(part, wrapper)
    )


def _wrapper_types() -> dict[type, str]:
    wrappers: dict[type, str] = {
        nn.DataParallel: "module",
        nn.parallel.DistributedDataParallel: "module",
    }
    # Importing dynamo takes seconds; without it nothing can have been compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        wrappers[dynamo.OptimizedModule] = "_orig_mod"
    return wrappers


def _canonical(raw: str, prefixes: frozenset[str]) -> str:
    if not prefixes:
        return raw
    kept = [part for so_far, part in _components(raw) if so_far not in prefixes]
    return ".".join(kept)


def _components(name: str) -> Iterator[tuple[str, str]]:
    """Each component with the name up to and including it and a dot."""
    so_far = ""
    for part in name.split("."):
        so_far += part + "."
        yield so_far, part


def _renamed(state: Any, prefixes: frozenset[str]) -> Any:
    renamed: Any = OrderedDict((_canonical(raw, prefixes), value) for raw, value in state.items())
    if len(renamed) != len(state):
        raise StateError("two entries of a wrapped module have the same name without the wrapper")
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # The wrapped module comes after its wrapper, and its own version is the one that counts.
        renamed._metadata = OrderedDict(
            (_canonical(raw, prefixes), value) for raw, value in metadata.items()
        )
    return renamed


def _raw_metadata(metadata: Any, live: Any, prefixes: frozenset[str]) -> Any:
    """The saved versions under the live module's own paths."""
    raw = OrderedDict(
        (path, metadata[_canonical(path, prefixes)])
        for path in getattr(live, "_metadata", {})
        if _canonical(path, prefixes) in metadata
    )
    return raw if prefixes else metadata


def _check_dtypes(name: str, live: Any, saved: Any) -> None:
    """Loading would cast without a word."""
    for key, value in saved.items():
        own = live.get(key)
        if (
            isinstance(own, torch.Tensor)
            and isinstance(value, torch.Tensor)
            and own.dtype is not value.dtype
        ):
            raise StateError(
                f"{name}: {key} was saved as {value.dtype} and is {own.dtype} now; "
                "build the module with the dtype that was saved"
            )
