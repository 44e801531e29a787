"""Plain values that share memory with a live module share it again after a restore.

A module copies saved values into its own memory, so a plain value that was, say, the module's
own ``state_dict()`` would from then on be a frozen copy, and the training would go another way.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import torch

from ckpt_tasks.state.modules import canonical_tensors
from ckpt_tasks.state.restored import RestoredValues

__all__ = ["Linker"]


class Linker:
    """Puts live tensors of modules in the place of saved ones that shared their memory.

    Parameters
    ----------
    values
        What was restored; only `RestoredValues` know which tensors shared memory.
    loaded
        Tracked name to (live object, saved state) of what has been loaded.
    """

    def __init__(self, values: Mapping[str, Any], loaded: Mapping[str, tuple[Any, Any]]) -> None:
        self._index_of = values.index_of if isinstance(values, RestoredValues) else {}
        self._loaded = loaded
        self._live: dict[int, torch.Tensor] | None = None

    def __call__(self, value: Any) -> Any:
        """`value`, with live tensors; containers are changed in place where they can be."""
        if isinstance(value, torch.Tensor):
            return self._linked(value)
        if type(value) in (dict, OrderedDict, Counter):
            for key, item in value.items():
                value[key] = self(item)
        elif type(value) in (list, deque):
            for i, item in enumerate(value):
                value[i] = self(item)
        elif type(value) is tuple:
            return tuple(self(item) for item in value)
        return value

    def _linked(self, saved: torch.Tensor) -> torch.Tensor:
        index = self._index_of.get(id(saved))
        if index is None:
            return saved
        live = self._live_tensors().get(index)
        if live is None:
            return saved
        return live if type(saved) is torch.nn.Parameter else live.detach()

    def _live_tensors(self) -> dict[int, torch.Tensor]:
        if self._live is None:
            self._live = {}
            for item, state in self._loaded.values():
                if isinstance(item, torch.nn.Module):
                    own = canonical_tensors(item)
                    for key, saved in state.items():
                        index = self._index_of.get(id(saved))
                        if index is not None and key in own:
                            self._live[index] = own[key]
        return self._live
