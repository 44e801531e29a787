"""States as a file that ``torch.load(path, weights_only=True)`` opens."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.format.tree import Path as TreePath
from ckpt_tasks.format.tree import path_text
from ckpt_tasks.state.optimizers import plain_optimizer_state
from ckpt_tasks.store import Store
from ckpt_tasks.training.load import load_values

__all__ = ["save_torch_file"]

# What torch's restricted unpickler makes (torch/_weights_only_unpickler.py).
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_LEAVES = (*_SCALARS, torch.dtype, torch.device, torch.Size, torch.Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)

_SHOWN = 5


def save_torch_file(
    store: Store, layout: RunLayout, record: CommitRecord, names: Collection[str], path: Path
) -> None:
    """Write ``{tracked name: state}``, every byte verified. Memory is taken for the tensors once.

    Raises
    ------
    StateError
        Values that are not restored without pickle; names each.

    and as `load_values`.
    """
    loaded = load_values(store, layout, record, names, keep_device=False)
    values = {name: plain_optimizer_state(value) for name, value in loaded.items()}
    refused = [text for name in names for text in _refused(values[name], (name,))]
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise StateError(
            f"torch.load(weights_only=True) would not restore {'; '.join(refused[:_SHOWN])}{more}; "
            "leave these out: --only NAME"
        )
    torch.save(values, path)
    # What this torch's tensors need that its own unpickler does not know, say; nothing is loaded.
    needed = get_unsafe_globals_in_checkpoint(path)
    if needed:
        raise StateError(f"torch.load(weights_only=True) would refuse {', '.join(sorted(needed))}")


def _refused(value: Any, path: TreePath) -> Iterator[str]:
    """Path and type of each value that would not come back."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, item in value.items():
            yield from _refused(key, (*path, key))
            yield from _refused(item, (*path, key))
    elif kind in _SEQUENCES:
        for number, item in enumerate(value):
            yield from _refused(item, (*path, number))
    elif kind not in _LEAVES:
        yield f"{path_text(path)}, a {kind.__module__}.{kind.__qualname__}"
