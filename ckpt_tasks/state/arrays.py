"""NumPy's arrays and scalars, which metrics, samplers and schedulers keep in their state.

NumPy is looked up, not imported: an object of its types cannot exist before it is.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch

__all__ = ["decode", "encode"]

_SCALAR_DTYPE = re.compile(r"[<>|=][biufc][0-9]{1,2}", re.ASCII)
_ARRAY_KINDS = frozenset("biufc")


def encode(value: Any) -> tuple[str, object] | None:
    """Tag and value of an array or scalar of numbers; ``None`` for anything else.

    An array goes by way of a tensor on the same memory, so that its bytes lie in the file.
    """
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.generic) and _SCALAR_DTYPE.fullmatch(value.dtype.str):
        return "numpy", [value.dtype.str, value.tobytes()]
    if type(value) is numpy.ndarray and value.dtype.kind in _ARRAY_KINDS:
        return _encode_array(numpy, value)
    return None


def _encode_array(numpy: Any, value: Any) -> tuple[str, object] | None:
    if not value.dtype.isnative:
        return None
    if not value.flags.writeable or any(step < 0 for step in value.strides):
        value = value.copy(order="K")
    try:
        return "ndarray", torch.from_numpy(value)
    except TypeError:
        return None


def decode(tag: str, value: Any) -> object:
    """The inverse of `encode`; raises ``ValueError`` or ``TypeError`` for what it refuses."""
    if tag == "ndarray" and type(value) is torch.Tensor and value.layout is torch.strided:
        return value.numpy()
    if tag == "numpy":
        dtype, data = value
        if not isinstance(dtype, str) or _SCALAR_DTYPE.fullmatch(dtype) is None:
            raise ValueError(f"{dtype!r} is no dtype of a number")
        import numpy

        return numpy.frombuffer(data, dtype=dtype, count=1)[0]
    raise ValueError(f"unknown tag {tag!r}")
