"""Sparse tensors, taken apart into their dense components, and put together again."""

from __future__ import annotations

from typing import Any

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.tree import Path, path_text
from ckpt_tasks.state.tensors import with_autograd

__all__ = ["compose", "decompose", "identity"]

_COMPRESSED = {
    torch.sparse_csr: "csr",
    torch.sparse_csc: "csc",
    torch.sparse_bsr: "bsr",
    torch.sparse_bsc: "bsc",
}
_LAYOUTS = {name: layout for layout, name in _COMPRESSED.items()}
_BY_ROWS = frozenset((torch.sparse_csr, torch.sparse_bsr))


def decompose(tensor: torch.Tensor, path: Path) -> dict[str, Any]:
    """Layout, size, and components as dense tensors; raises `StateError` for other layouts."""
    parts: dict[str, Any] = {"size": list(tensor.shape)}
    if type(tensor) is torch.nn.Parameter:
        parts["parameter"] = True
    if tensor.requires_grad:
        parts["grad"] = True
    values = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        # indices() and values() would refuse a tensor that is not coalesced.
        components = {"indices": values._indices(), "values": values._values()}
        return {"layout": "coo", **parts, "coalesced": tensor.is_coalesced(), **components}
    if tensor.layout not in _COMPRESSED:
        raise StateError(f"{path_text(path)} is a tensor of {tensor.layout}, which cannot be saved")
    by_rows = tensor.layout in _BY_ROWS
    return {
        "layout": _COMPRESSED[tensor.layout],
        **parts,
        "compressed": values.crow_indices() if by_rows else values.ccol_indices(),
        "plain": values.col_indices() if by_rows else values.row_indices(),
        "values": values.values(),
    }


def identity(parts: Any) -> tuple[object, ...]:
    """Equal for the same sparse tensor met twice: its components are the same objects then."""
    if not isinstance(parts, dict):
        raise TypeError("a sparse tensor is no dict of its parts")
    tensors = sorted((key, id(part)) for key, part in parts.items() if _is_tensor(part))
    plain = sorted((key, repr(part)) for key, part in parts.items() if not _is_tensor(part))
    return (*tensors, *plain)


def compose(parts: dict[str, Any]) -> torch.Tensor:
    """The inverse of `decompose`; raises ``ValueError`` where the parts do not fit."""
    try:
        tensor = _composed(parts)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"a sparse tensor's parts do not fit: {error}") from error
    return with_autograd(tensor, parts)


def _composed(parts: dict[str, Any]) -> torch.Tensor:
    size = torch.Size(parts["size"])
    if parts["layout"] == "coo":
        return torch.sparse_coo_tensor(
            parts["indices"],
            parts["values"],
            size,
            check_invariants=True,
            is_coalesced=bool(parts["coalesced"]),
        )
    return torch.sparse_compressed_tensor(
        parts["compressed"],
        parts["plain"],
        parts["values"],
        size,
        layout=_LAYOUTS[parts["layout"]],
        check_invariants=True,
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
