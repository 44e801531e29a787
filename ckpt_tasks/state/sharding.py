"""DTensors: which part of the global tensor this rank holds, found without any communication.

In a tree a DTensor is ``{"$": "sharded", "v": [facts, local]}``: `local` is the reference to the
tensor of this rank's own part (see `state.tensors`), or null where it holds none; `facts` are
the members below.

=============  ==================================================================================
``shape``      of the global tensor
``offsets``    where this rank's part begins, by dimension; null where it holds none
``parameter``  true for an ``nn.Parameter``
``grad``       true where it requires grad
=============  ==================================================================================

torch.distributed.tensor is looked up, not imported: a DTensor cannot exist before it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.blocks import Part
from ckpt_tasks.format.tree import Path, SamePath, path_text

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["decompose", "dtensor_on", "is_dtensor", "local_part", "part_of"]


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether `value` is a DTensor, of FSDP2 or tensor parallel."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a DTensor, what this rank holds, on the same memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # with it, to_local() would record a view in the autograd graph
        return tensor.to_local().detach()


def part_of(tensor: DTensor, what: str) -> Part | None:
    """Where this rank's part of a DTensor lies; ``None`` outside of its mesh.

    Raises `StateError`, naming `what`, for values that are not yet reduced, or a part that is
    not one block of the global tensor.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise StateError(f"{what} is a DTensor with partial placements; redistribute it first")
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    replicated = any(
        placement.is_replicate() and mesh.size(dimension) > 1
        for dimension, placement in enumerate(tensor.placements)
    )
    part = Part(tuple(offsets), tuple(sizes), replicated)
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        _check_block(tensor, part, what)
    return part


def decompose(tensor: DTensor, path: Path) -> tuple[Part | None, torch.Tensor | None, SamePath]:
    """A DTensor's part and its local tensor, and the leaf of the tree that holds both."""
    part = part_of(tensor, path_text(path))
    facts: dict[str, Any] = {
        "shape": list(tensor.shape),
        "offsets": None if part is None else list(part.offsets),
    }
    if isinstance(tensor, torch.nn.Parameter):
        facts["parameter"] = True
    if tensor.requires_grad:
        facts["grad"] = True
    if part is None:
        return None, None, SamePath((facts, None))
    local = local_part(tensor)
    if tuple(local.shape) != part.sizes:
        raise StateError(
            f"{path_text(path)} is a DTensor whose local part has shape {list(local.shape)}, "
            f"where its placements say {list(part.sizes)}"
        )
    return part, local, SamePath((facts, local))


def dtensor_on(live: DTensor, local: torch.Tensor) -> DTensor:
    """`local` as this rank's part of a tensor that is placed as `live` is; no communication."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(local_part(live).device),
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=live.shape,
        stride=live.stride(),
    )


def _check_block(tensor: DTensor, part: Part, what: str) -> None:
    """Strided shards, of FSDP2 over tensor parallel, are one block where the two divide evenly."""
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    rows = [torch.arange(size) for size in tensor.shape]
    for dimension, placement in enumerate(tensor.placements):
        axis = getattr(placement, "dim", None)
        if axis is not None:
            split: Any = placement
            pieces, _ = split._split_tensor(
                rows[axis], tensor.device_mesh.size(dimension), with_padding=False, contiguous=False
            )
            rows[axis] = pieces[coordinate[dimension]]
    for own, size, offset in zip(rows, part.sizes, part.offsets, strict=True):
        if not torch.equal(own, torch.arange(offset, offset + size)) and 0 not in part.sizes:
            raise StateError(
                f"{what} is a DTensor placed as {tensor.placements}, so that this rank's part is "
                "no block of it, which cannot be saved; redistribute it first"
            )
