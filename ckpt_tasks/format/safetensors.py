"""Headers of safetensors files, without torch or the safetensors library.

A file is 8 bytes of little-endian header length, the header (JSON, padded with spaces), and the
tensors' bytes, contiguous and in order of the header
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from ckpt_tasks.format.distinct import check_distinct
from ckpt_tasks.format.records import MAX_HEADER_BYTES

__all__ = [
    "DTYPE_BYTES",
    "HEADER_ALIGNMENT",
    "TENSOR_ALIGNMENT",
    "TensorSpec",
    "build_header",
    "parse_header",
]

HEADER_ALIGNMENT = 4096
"""Tensors start on a page, so that a direct write or a mapping of them is aligned."""

TENSOR_ALIGNMENT = 64
"""Where torch's own allocator puts a tensor's first byte, in the process' memory."""

_MAX_DIMENSIONS = 64  # torch's own limit

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of the dtypes that every release of the library since 0.6 opens."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor in a header: its name, its dtype as safetensors spells it, and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class _HeaderTensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_DECODER = msgspec.json.Decoder(_HeaderTensor)


def build_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length, header and padding for `tensors` in this order; the data follows at its end."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.key in entries:
            raise ValueError(f"two tensors are named {tensor.key!r}")
        entries[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = msgspec.json.encode(entries)
    length = -(-(len(text) + 8) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes is more than safetensors allows")
    return length.to_bytes(8, "little") + text.ljust(length)


def parse_header(header: bytes) -> dict[str, tuple[TensorSpec, int]]:
    """Name to (spec, offset behind the header), from the bytes `build_header` returns.

    Raises ``ValueError`` for anything that is not a well-formed header.
    """
    if len(header) < 8 or int.from_bytes(header[:8], "little") != len(header) - 8:
        raise ValueError("the header's length is wrong")
    try:
        raw = msgspec.json.decode(header[8:], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {key: _DECODER.decode(entry) for key, entry in raw.items()}
        check_distinct(
            header[8:].rstrip(b" "), msgspec.json.encode({"__metadata__": metadata, **entries})
        )
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"the header is no valid safetensors header: {error}") from error
    found: dict[str, tuple[TensorSpec, int]] = {}
    places: list[tuple[int, int, str]] = []
    for key, entry in entries.items():
        start, stop = entry.data_offsets
        shape = entry.shape
        if (
            entry.dtype not in DTYPE_BYTES
            or len(shape) > _MAX_DIMENSIONS
            or min(shape, default=0) < 0
        ):
            raise ValueError(f"tensor {key!r} has dtype {entry.dtype} and shape {shape[:99]}")
        spec = TensorSpec(key, entry.dtype, tuple(shape))
        if start < 0 or stop - start != spec.size:
            raise ValueError(f"tensor {key!r} has offsets {start}..{stop}")
        found[key] = (spec, start)
        places.append((start, stop, key))
    _check_contiguous(places)
    return found


def _check_contiguous(places: list[tuple[int, int, str]]) -> None:
    """Neither holes nor overlaps, as the library demands: hidden or shared bytes are no tensor."""
    end = 0
    for start, stop, key in sorted(places):
        if start != end:
            raise ValueError(f"tensor {key!r} starts at {start}, where byte {end} comes next")
        end = stop
