"""Tensors as a safetensors file holds them, and back.

A **tensor image** is what is written: a dtype that safetensors knows, a shape, and the bytes of
the values in row-major order. What an image cannot say is put into the **reference** by which
the tree names it: the image's index alone for a plain tensor, else an object with the members
below. An absent member means "as the image".

=============  ==================================================================================
``index``      which image
``dtype``      the true dtype: ``complex128`` and ``complex32`` are stored as reals with a last
               dimension of 2, one-byte dtypes that safetensors has no name for as U8
``stride``     strides of a dense tensor that is not row-major (channels_last, transposed)
``device``     where it was: ``cuda`` for the process's current device, else with the number
``grad``       true where the tensor requires grad
``parameter``  true for an ``nn.Parameter``
=============  ==================================================================================

Views with gaps and expanded tensors are stored as their values, lazy conjugation and negation
are resolved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.blocks import Part
from ckpt_tasks.format.safetensors import TENSOR_ALIGNMENT
from ckpt_tasks.format.tree import Path, path_text

__all__ = [
    "Memory",
    "TensorImage",
    "check_supported",
    "image_of",
    "named_device",
    "plain_memory",
    "reference_details",
    "row_major_strides",
    "tensor_from_buffer",
    "values_from_image",
    "with_autograd",
]

SAFETENSORS_DTYPES: Final[dict[torch.dtype, str]] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# Conjugation of what is complex may be lazy.
_PLAIN_DTYPES = {d: name for d, name in SAFETENSORS_DTYPES.items() if not d.is_complex}

_AS_REAL = {torch.complex128: torch.float64, torch.complex32: torch.float16}
_AS_BYTES = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if hasattr(torch, name)
)
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in (*_AS_REAL, *_AS_BYTES)}

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))


class TensorImage:
    """One tensor as it is written.

    Parameters
    ----------
    item
        The tracked name whose file holds it.
    key
        Its name inside that file, unique there.
    dtype
        As safetensors spells it.
    shape
        Of the image; for complex128 one dimension more than the tensor's.
    is_parameter
        It is a parameter of a module: one that holds NaN or infinity is broken.
    data
        Row-major contiguous, detached, on the tensor's own device. On CPU it shares memory with
        the live tensor wherever that is row-major itself, so copy it before training goes on.

    Attributes
    ----------
    nbytes
        Bytes of the image.
    part
        Of a DTensor, whose local part this is; ``None`` for a tensor that is whole.
    source
        The tensor that was captured, whose version counter counts what is done to it in place. A
        DTensor's local part does not count what is done to the DTensor.
    name
        Of its tensor, for people: ``model.fc.weight``.
    """

    __slots__ = (
        "_tensor_key",
        "data",
        "dtype",
        "is_parameter",
        "item",
        "key",
        "nbytes",
        "part",
        "shape",
        "source",
    )

    def __init__(
        self,
        item: str,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        data: torch.Tensor,
        *,
        is_parameter: bool = False,
    ) -> None:
        self.item = item
        self.key = key
        self.dtype = dtype
        self.shape = shape
        self.data = data
        self.nbytes: int = data.nbytes
        self.is_parameter = is_parameter
        self.part: Part | None = None
        self.source = data
        self._tensor_key = key

    @property
    def name(self) -> str:
        return f"{self.item}.{self._tensor_key}"

    @property
    def is_block(self) -> bool:
        """Whether it has only some rows of its tensor."""
        return self.key != self._tensor_key

    def rows(self, start: int, stop: int, key: str) -> TensorImage:
        """Its rows from `start` to `stop`, on the same memory, as an image of their own."""
        data = self.data[start:stop]
        block = TensorImage(
            *(self.item, key, self.dtype, tuple(data.shape), data), is_parameter=self.is_parameter
        )
        block._tensor_key = self.key
        return block

    def __repr__(self) -> str:
        return f"TensorImage({self.item!r}, {self.key!r}, {self.dtype}, {list(self.shape)})"


def check_supported(tensor: torch.Tensor, path: Path) -> None:
    """Refuse what has no exact image; raises `StateError` naming `path` and the type."""
    problem = _problem(tensor)
    if problem is not None:
        raise StateError(f"{path_text(path)} {problem}")


def _problem(tensor: torch.Tensor) -> str | None:
    kind = type(tensor)
    if kind not in _PLAIN_TYPES:
        return _subclass_problem(kind)
    if tensor.is_meta:
        return "is a tensor on the meta device, which holds no values; materialise it first"
    if tensor.is_quantized:
        return f"is a quantized tensor ({tensor.dtype}); save its int_repr(), scale and zero point"
    if tensor.is_nested:
        return "is a nested tensor; save a list of its components"
    if tensor.grad_fn is not None:
        return "is part of an autograd graph, which cannot be saved; store value.detach() instead"
    if tensor.layout is torch.strided and not _has_memory(tensor):
        return "is a tensor without memory of its own; clone() it"
    return None


def _subclass_problem(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if "Uninitialized" in kind.__qualname__:
        return f"is a {name}: run the lazy module once before it is tracked"
    return f"is a {name}, a tensor subclass that cannot be saved exactly; store plain tensors"


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() != 0 or tensor.numel() == 0


Memory = tuple[int, torch.dtype, torch.Size]
"""Address, dtype and shape: equal for two row-major tensors that are the same values."""


def plain_memory(tensor: torch.Tensor) -> tuple[str, Memory] | None:
    """The safetensors dtype and the memory of a tensor whose image is its memory and whose
    reference is its index.

    Most are such: a few questions to each of thousands, instead of all of them. ``None`` for any
    other, supported or not, and for one without elements.
    """
    if (
        type(tensor) is not torch.Tensor
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.requires_grad
        or tensor.is_nested
        or tensor.is_neg()
    ):
        return None
    dtype, shape, address = tensor.dtype, tensor.shape, tensor.data_ptr()
    name = _PLAIN_DTYPES.get(dtype)
    if name is None or not address or 0 in shape or tensor.stride() != row_major_strides(shape):
        return None
    return name, (address, dtype, shape)


def image_of(tensor: torch.Tensor, path: Path) -> tuple[str, torch.Tensor]:
    """The safetensors dtype and the row-major data of a supported strided tensor.

    Raises `StateError` for a dtype that has no exact image.
    """
    data = tensor.detach()
    if data.is_conj() or data.is_neg():
        data = data.resolve_conj().resolve_neg()
    name = SAFETENSORS_DTYPES.get(data.dtype)
    if name is not None:
        return name, data.contiguous()
    if data.dtype in _AS_REAL:
        real = torch.view_as_real(data.contiguous())
        return SAFETENSORS_DTYPES[real.dtype], real
    if data.dtype in _AS_BYTES:
        return "U8", data.contiguous().view(torch.uint8)
    raise StateError(f"{path_text(path)} is a tensor of {data.dtype}, which cannot be saved")


@lru_cache(maxsize=4096)
def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements fill their memory without gap or overlap, in whatever order."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def reference_details(tensor: torch.Tensor, *, with_device: bool) -> dict[str, object]:
    """What the image does not say; empty for a plain tensor."""
    details: dict[str, object] = {}
    if tensor.dtype in _AS_REAL or tensor.dtype in _AS_BYTES:
        details["dtype"] = str(tensor.dtype).removeprefix("torch.")
    shape, stride = tensor.shape, tensor.stride()
    if tensor.numel() and stride != row_major_strides(shape) and is_dense(shape, stride):
        details["stride"] = list(stride)
    if with_device and not tensor.is_cpu:
        details["device"] = _device_name(tensor.device)
    if type(tensor) is torch.nn.Parameter:
        details["parameter"] = True
    if tensor.requires_grad:
        details["grad"] = True
    return details


def _device_name(device: torch.device) -> str:
    # A retry may run on another card: the process's current device is saved as just that.
    if _is_accelerator(device) and device.index == torch.accelerator.current_device_index():
        return device.type
    return str(device)


def _is_accelerator(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def tensor_from_buffer(buffer: Any, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that an image's bytes hold.

    Parameters
    ----------
    buffer
        Bytes-like. A writable one is used as the tensor's memory, and belongs to it from then
        on; one that is read-only, or does not begin where torch would put it, is copied.
    dtype
        As safetensors spells it.
    shape
        Row-major.

    Raises
    ------
    ValueError
        Unknown dtype, or a buffer whose size does not fit the shape.
    """
    torch_dtype = _TORCH_DTYPES.get(dtype)
    if torch_dtype is None:
        raise ValueError(f"unknown dtype {dtype!r}")
    view = memoryview(buffer)
    size = view.nbytes
    if min(shape, default=0) < 0 or size != math.prod(shape) * torch_dtype.itemsize:
        raise ValueError(f"{size} bytes do not hold {dtype} of shape {list(shape)}")
    if size == 0:
        return torch.empty(tuple(shape), dtype=torch_dtype)
    if view.readonly:
        view = memoryview(bytearray(view))
    flat = torch.frombuffer(view, dtype=torch_dtype)
    if flat.data_ptr() % TENSOR_ALIGNMENT:
        # Kernels may compute in another order on it, with other roundings.
        flat = flat.clone()
    return flat.view(tuple(shape))


def values_from_image(image: torch.Tensor, details: dict[str, Any]) -> torch.Tensor:
    """Undo the recorded dtype, strides and device; uses `image` as memory where possible.

    Raises ``ValueError`` for details that do not fit the image. They are not trusted.
    """
    tensor = image
    if "dtype" in details:
        tensor = _with_dtype(tensor, details["dtype"])
    if "stride" in details:
        tensor = _with_stride(tensor, details["stride"])
    if "device" in details:
        tensor = tensor.to(_available_device(details["device"]))
    return tensor


def with_autograd(tensor: torch.Tensor, details: dict[str, Any]) -> torch.Tensor:
    """`tensor` itself, or a parameter or a tensor that requires grad on the same memory.

    Raises ``ValueError`` where values of this dtype cannot require grad.
    """
    grad = bool(details.get("grad"))
    if grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"a tensor of {tensor.dtype} cannot require grad")
    if details.get("parameter"):
        return torch.nn.Parameter(tensor, requires_grad=grad)
    return tensor.detach().requires_grad_() if grad else tensor


def _with_dtype(image: torch.Tensor, name: object) -> torch.Tensor:
    dtype = _BY_NAME.get(str(name), torch.uint8)
    if dtype in _AS_REAL and image.dtype is _AS_REAL[dtype] and image.shape[-1:] == (2,):
        return torch.view_as_complex(image)
    if dtype in _AS_BYTES and image.dtype is torch.uint8:
        return image.view(dtype)
    raise ValueError(f"a tensor of {image.dtype} and shape {list(image.shape)} is no {name!r}")


def _with_stride(image: torch.Tensor, stride: object) -> torch.Tensor:
    shape = tuple(image.shape)
    if (
        not isinstance(stride, list)
        or len(stride) != len(shape)
        or any(type(step) is not int or not 0 <= step < 2**63 for step in stride)
        or not is_dense(shape, stride)
    ):
        raise ValueError(f"strides {stride!r} do not fit a tensor of shape {list(shape)}")
    if all(
        size == 1 or step == own
        for size, step, own in zip(shape, stride, image.stride(), strict=True)
    ):
        return image.as_strided(shape, stride)
    return torch.empty_strided(shape, stride, dtype=image.dtype, device=image.device).copy_(image)


def named_device(name: object) -> torch.device:
    """A device by its name; raises ``ValueError`` for what names none."""
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _available_device(name: object) -> torch.device:
    """The recorded device, or the nearest that this machine has."""
    device = named_device(name)
    if not _is_accelerator(device):
        return torch.device("cpu")
    if device.index is None or device.index >= torch.accelerator.device_count():
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device
