"""Tensors of every dtype, layout and kind come back as they were, or are refused."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.images import bytes_of

from ckpt_tasks.errors import CorruptCheckpointError, StateError
from ckpt_tasks.format.safetensors import DTYPE_BYTES
from ckpt_tasks.state.capture import capture, restore_values
from ckpt_tasks.state.tensors import SAFETENSORS_DTYPES, tensor_from_buffer

OTHER_DTYPES = [
    torch.complex128,
    torch.complex32,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]
DTYPES = [*SAFETENSORS_DTYPES, *OTHER_DTYPES]

RoundTrip = Callable[[Any], Any]
Bits = Callable[[torch.Tensor], bytes]


def tensor_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of arbitrary bits, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    count = int(np.prod(shape))
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        raw %= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is "experimental"
        return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1),
    "permuted": lambda t: t.permute(2, 0, 1),
    "sliced": lambda t: t[1:],
    "0-dim": lambda t: t[0, 0, 0],
    "empty": lambda t: t[:0],
    "with gaps": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_every_dtype_and_view_comes_back_bit_by_bit(
    dtype: torch.dtype, view: str, value_through_storage: RoundTrip, bits: Bits
) -> None:
    """Values, dtype and shape are exact; strides too, where there are neither gaps nor overlap."""
    tensor = VIEWS[view](tensor_of(dtype, 2, 4, 4))
    back = value_through_storage(tensor)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)
    if view not in ("with gaps", "expanded"):
        assert back.stride() == tensor.stride()


def test_dtypes_are_the_ones_the_format_knows() -> None:
    """Names and sizes agree with the table of the format's own module."""
    sizes = {name: dtype.itemsize for dtype, name in SAFETENSORS_DTYPES.items()}
    assert sizes == dict(DTYPE_BYTES)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 2, 4, 5), torch.channels_last_3d)],
)
def test_memory_format_is_kept(
    shape: tuple[int, ...], memory_format: torch.memory_format, value_through_storage: RoundTrip
) -> None:
    """A channels_last tensor stays channels_last; the file holds it row-major."""
    tensor = torch.randn(shape).to(memory_format=memory_format)
    captured = capture({"item": tensor})
    assert captured.tensors[0].shape == shape
    assert captured.tensors[0].data.is_contiguous()
    back = value_through_storage(tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_strides_of_dimensions_of_one_are_kept(value_through_storage: RoundTrip) -> None:
    """A tensor that is row-major and channels_last at once keeps the strides it has."""
    tensor = torch.randn(2, 1, 4, 4).to(memory_format=torch.channels_last)
    assert tensor.is_contiguous()
    assert value_through_storage(tensor).stride() == tensor.stride() == (16, 1, 4, 1)


def test_conjugated_and_negated_views_are_resolved(value_through_storage: RoundTrip) -> None:
    """Lazy conjugation and negation are carried out, not lost."""
    tensor = torch.randn(3, dtype=torch.complex64)
    for view in (tensor.conj(), tensor.conj().imag):
        back = value_through_storage(view)
        assert torch.equal(back, view.resolve_conj().resolve_neg())
        assert not back.is_conj()
        assert not back.is_neg()


def sparse_tensors() -> dict[str, torch.Tensor]:
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
        indices = torch.tensor([[0, 0, 1], [1, 1, 0]])
        return {
            "uncoalesced": torch.sparse_coo_tensor(indices, torch.randn(3), (2, 4)),
            "coalesced": dense.to_sparse(),
            "hybrid": torch.sparse_coo_tensor(indices[:1], torch.randn(3, 4), (2, 4)),
            "complex128": dense.to(torch.complex128).to_sparse(),
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((1, 2)),
            "bsc": dense.to_sparse_bsc((1, 2)),
            "empty": torch.sparse_coo_tensor(size=(2, 4)),
        }


@pytest.mark.parametrize("name", sparse_tensors())
def test_sparse_tensors_come_back_in_their_layout(
    name: str, value_through_storage: RoundTrip
) -> None:
    """Layout, entries, duplicates and the coalesced flag are kept."""
    tensor = sparse_tensors()[name]
    back = value_through_storage(tensor)
    assert (back.layout, back.dtype, back.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert torch.equal(back.to_dense(), tensor.to_dense())
    if tensor.layout is torch.sparse_coo:
        assert back.is_coalesced() == tensor.is_coalesced()
        assert torch.equal(back._indices(), tensor._indices())


def test_a_sparse_tensor_met_twice_comes_back_as_one(value_through_storage: RoundTrip) -> None:
    """Identity is kept for sparse tensors as for dense ones."""
    tensor = sparse_tensors()["coalesced"]
    first, second = value_through_storage([tensor, tensor])
    assert first is second


def test_parameters_and_gradients_are_recorded(value_through_storage: RoundTrip) -> None:
    """A parameter stays one, and a tensor that requires grad goes on requiring it."""
    value = {
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.arange(2), requires_grad=False),
        "leaf": torch.randn(2, requires_grad=True),
        "plain": torch.randn(2),
        "sparse": torch.eye(2).to_sparse().requires_grad_(),
    }
    back = value_through_storage(value)
    for key, tensor in value.items():
        assert type(back[key]) is type(tensor), key
        assert back[key].requires_grad == tensor.requires_grad, key
        assert back[key].is_leaf, key


def test_identical_tensors_come_back_as_one_object(through_storage: RoundTrip) -> None:
    """Tensors of one memory, across tracked items, are stored once and restored as one."""
    shared = torch.randn(3)
    items = {"a": {"x": shared, "y": shared.detach()}, "b": [shared.view(3)]}
    captured = capture(items)
    assert [image.key for image in captured.tensors] == ["x"]
    back = through_storage(items)
    assert back["a"]["x"] is back["a"]["y"]
    assert back["a"]["x"] is back["b"][0]


def test_a_parameter_and_its_data_share_memory_again(value_through_storage: RoundTrip) -> None:
    """A parameter and a plain tensor on its memory stay two objects on one memory."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    back = value_through_storage([parameter, parameter.data])
    with torch.no_grad():
        back[0].add_(1)
    assert back[1].tolist() == [1.0, 1.0]


def test_different_views_of_one_memory_are_stored_apart() -> None:
    """Overlapping views that differ are separate tensors."""
    base = torch.arange(6.0)
    captured = capture(
        {"item": [base, base[:3], base.view(2, 3), base[3:], base.view(torch.int32)]}
    )
    assert len(captured.tensors) == 5
    assert {(image.shape, image.dtype) for image in captured.tensors} == {
        ((6,), "F32"),
        ((3,), "F32"),
        ((2, 3), "F32"),
        ((6,), "I32"),
    }


def test_contiguous_tensors_are_not_copied() -> None:
    """An image of a row-major CPU tensor is the live tensor's own memory, down to the buffer."""
    tensor = torch.zeros(4)
    image = capture({"item": tensor}).tensors[0]
    tensor.fill_(1.0)
    assert image.data.data_ptr() == tensor.data_ptr()
    assert bytes(bytes_of(image)) == np.ones(4, dtype="float32").tobytes()
    assert len(bytes_of(image)) == image.nbytes == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_are_of_the_size_they_say(dtype: torch.dtype) -> None:
    """Dtype and shape of an image give exactly the bytes of its buffer."""
    image = capture({"item": tensor_of(dtype, 2, 3)}).tensors[0]
    size = int(np.prod(image.shape)) * DTYPE_BYTES[image.dtype]
    assert len(bytes_of(image)) == image.nbytes == size


def test_a_writable_buffer_becomes_the_tensor() -> None:
    """No copy is made of writable memory; read-only and unaligned memory is copied.

    Aligned is what torch's own tensors are: kernels may compute on others in another order.
    """
    buffer = mmap.mmap(-1, 4096)
    tensor = tensor_from_buffer(memoryview(buffer)[64:88], "F32", (2, 3))
    tensor.fill_(1.0)
    assert buffer[64:88] == np.ones(6, dtype="float32").tobytes()
    moved = tensor_from_buffer(memoryview(buffer)[68:88], "F32", (5,))
    moved.zero_()
    assert tensor.sum() == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = tensor_from_buffer(buffer[64:88], "F32", (6,))
    copied.zero_()
    unaligned = tensor_from_buffer(memoryview(bytearray(25))[1:], "F64", (3,))
    assert unaligned.data_ptr() % 64 == 0
    assert unaligned.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("size", "dtype", "shape"),
    [(4, "F99", (1,)), (5, "F32", (1,)), (4, "F32", (2,)), (0, "F32", ()), (4, "F32", (-1, -1))],
)
def test_a_buffer_that_does_not_fit_is_refused(
    size: int, dtype: str, shape: tuple[int, ...]
) -> None:
    """An unknown dtype or another size raises ValueError."""
    with pytest.raises(ValueError, match=r"unknown dtype|do not hold"):
        tensor_from_buffer(bytearray(size), dtype, shape)


class Subclass(torch.Tensor):
    pass


def unsupported_tensors() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    return {
        "meta": (torch.empty(2, device="meta"), "meta device"),
        "quantized": (quantized, "quantized"),
        "nested": (nested, "nested"),
        "jagged": (jagged, "NestedTensor"),
        "subclass": (torch.ones(2).as_subclass(Subclass), "Subclass"),
        "lazy": (torch.nn.LazyLinear(2).weight, "run the lazy module once"),
        "graph": (torch.ones(2, requires_grad=True) * 2, r"detach\(\)"),
        "zero": (torch._efficientzerotensor((2,)), r"clone\(\)"),
        "int4": (torch.zeros(2, dtype=torch.uint8).view(torch.int4), "torch.int4"),
        "mkldnn": (torch.ones(2, 2).to_mkldnn(), "mkldnn"),
    }


@pytest.mark.parametrize("name", unsupported_tensors())
def test_what_has_no_exact_image_is_refused(name: str) -> None:
    """Such a tensor raises StateError that names key, type and a way out."""
    tensor, says = unsupported_tensors()[name]
    with pytest.raises(StateError, match=says) as caught:
        capture({"item": {"key": [tensor]}})
    assert "item['key'][0]" in str(caught.value)


@pytest.mark.parametrize(
    "reference",
    [
        -1,
        7,
        True,
        None,
        "0",
        {"index": 0, "code": 1},
        {"index": 0, "dtype": "complex128"},
        {"index": 0, "dtype": "float8_e8m0fnu"},
        {"index": 0, "dtype": "load"},
        {"index": 0, "dtype": ["x"]},
        {"index": 0, "stride": [1, 1]},
        {"index": 0, "stride": [0, 2**70]},
        {"index": 0, "stride": "12"},
        {"index": 0, "stride": [1, 2, 3]},
        {"index": 0, "stride": [-1, 2]},
        {"index": 0, "device": "no such device"},
        {"index": 1, "grad": True},
        {"dtype": "complex128"},
    ],
    ids=str,
)
def test_hostile_references_are_corrupt(reference: Any) -> None:
    """A reference that capture does not write raises CorruptCheckpointError."""
    images = [torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)]
    with pytest.raises(CorruptCheckpointError, match="item"):
        restore_values({"item": {"$": "tensor", "v": reference}}, images.__getitem__)


@pytest.mark.parametrize(
    "parts",
    [
        3,
        {},
        {"layout": "coo"},
        {"layout": "coo", "size": [2], "indices": 0, "values": 0, "coalesced": True},
        {"layout": "csr", "size": [2, 2], "compressed": 0, "plain": 0, "values": 0},
        {"layout": "exec", "size": [2, 2], "compressed": 0, "plain": 0, "values": 0},
    ],
    ids=str,
)
def test_hostile_sparse_parts_are_corrupt(parts: Any) -> None:
    """Components that make no sparse tensor raise CorruptCheckpointError."""
    if isinstance(parts, dict):
        parts = {
            key: {"$": "tensor", "v": part} if part == 0 else part for key, part in parts.items()
        }
    with pytest.raises(CorruptCheckpointError):
        restore_values({"item": {"$": "sparse", "v": parts}}, lambda index: torch.tensor([[5, 9]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_come_back_on_their_device(value_through_storage: RoundTrip) -> None:
    """A tensor on the current CUDA device is copied to host to be written, and comes back there."""
    tensor = torch.randn(3, 4, device="cuda").t()
    captured = capture({"item": tensor})
    assert captured.trees["item"]["v"]["device"] == "cuda"
    assert captured.tensors[0].data.is_cuda
    back = value_through_storage(tensor)
    assert back.device == tensor.device
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)
