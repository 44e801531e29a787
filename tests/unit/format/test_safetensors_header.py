"""Headers of safetensors files: the library reads ours, and we refuse broken ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tasks.format.safetensors import (
    DTYPE_BYTES,
    HEADER_ALIGNMENT,
    TensorSpec,
    build_header,
    parse_header,
)

SPECS = st.lists(
    st.builds(
        TensorSpec,
        key=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        dtype=st.sampled_from(sorted(DTYPE_BYTES)),
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.key,
).filter(lambda specs: all(spec.key != "__metadata__" for spec in specs))


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def header(**entries: Any) -> bytes:
    return with_length(json.dumps(entries).encode())


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@given(SPECS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_round_trip(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    """Names, dtypes and shapes come back, at the place behind those before them; page-aligned."""
    built = build_header(specs, metadata)
    assert len(built) % HEADER_ALIGNMENT == 0
    parsed = parse_header(built)
    assert [spec for spec, _ in parsed.values()] == specs
    offset = 0
    for spec, start in parsed.values():
        assert start == offset
        offset += spec.size


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":%b,"a":%b}',
        b'{"a":{"dtype":"I8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":"1","a":"1"}}',
        b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}',
    ],
)
def test_a_name_twice_is_refused(text: bytes) -> None:
    """Of a tensor, of what is said of one, or of a note: readers differ in which they take."""
    tensor = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(ValueError, match="twice"):
        parse_header(with_length(text.replace(b"%b", tensor)))


@settings(deadline=None, max_examples=50)
@given(SPECS)
def test_library_reads_our_files(specs: list[TensorSpec]) -> None:
    """The safetensors library opens a file with our header, and finds each tensor's bytes."""
    data = bytes(range(256)) * (sum(spec.size for spec in specs) // 256 + 1)
    data = data[: sum(spec.size for spec in specs)]
    tensors = safetensors.torch.load(build_header(specs, {"format": "pt"}) + data)
    assert set(tensors) == {spec.key for spec in specs}
    for spec, start in parse_header(build_header(specs, {})).values():
        tensor = tensors[spec.key]
        assert tuple(tensor.shape) == spec.shape
        stored = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if spec.dtype != "BOOL":  # the library may make any byte one of two
            assert stored == data[start : start + spec.size]


def test_we_read_the_librarys_files() -> None:
    """Headers written by the library are understood."""
    data = safetensors.torch.save({"b": torch.ones(2, 3), "a": torch.zeros(5, dtype=torch.int8)})
    length = int.from_bytes(data[:8], "little")
    parsed = parse_header(data[: 8 + length])
    assert {key: (spec.dtype, spec.shape) for key, (spec, _) in parsed.items()} == {
        "b": ("F32", (2, 3)),
        "a": ("I8", (5,)),
    }


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"1234567",
        with_length(b"")[:-1] + b"\1",
        with_length(b"not json"),
        with_length(b"[]"),
        with_length(b"\xff\xfe"),
        with_length(b"{" * 100_000),
        (2**63).to_bytes(8, "little") + b"{}",
        header(x=5),
        header(x=entry([2], 0, 7)),
        header(x=entry([2], 0, 9)),
        header(x=entry([2], 8, 0)),
        header(x=entry([-2], 0, -8)),
        header(x=entry([-1, -2], 0, 8)),
        header(x=entry([2], -8, 0)),
        header(x=entry([1], 0, 4, dtype="F33")),
        header(x=entry([2**62, 2**62], 0, 8)),
        header(x=entry([1] * 65, 0, 4)),
        header(x={**entry([1], 0, 4), "code": "x"}),
        header(x=entry([2], 4, 12)),
        header(x=entry([2], 0, 8), y=entry([2], 4, 12)),
        header(x=entry([2], 0, 8), y=entry([2], 12, 20)),
        header(x=entry([2], 0, 8), y=entry([2], 0, 8)),
    ],
)
def test_broken_headers_are_refused(broken: bytes) -> None:
    """Wrong lengths, types, sizes, holes and overlaps raise ``ValueError`` and nothing else."""
    with pytest.raises(ValueError, match=r"header|tensor"):
        parse_header(broken)


@settings(max_examples=500)
@given(SPECS, st.data())
def test_changed_headers_raise_nothing_else(specs: list[TensorSpec], data: st.DataObject) -> None:
    """Any changed bytes give a header that still adds up, or ``ValueError``."""
    text = bytearray(build_header(specs, {})[8:].rstrip())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parsed = parse_header(with_length(bytes(text)))
    except ValueError:
        return
    stop = 0
    for start, size in sorted((start, spec.size) for spec, start in parsed.values()):
        assert start == stop
        stop += size


def test_two_tensors_of_one_name_are_refused() -> None:
    """A header cannot hold a name twice, nor one that means metadata."""
    for names in (["x", "x"], ["__metadata__"]):
        with pytest.raises(ValueError, match="two tensors are named"):
            build_header([TensorSpec(name, "F32", (1,)) for name in names], {})
