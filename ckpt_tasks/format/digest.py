"""Digests of chunks: BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs), 32 bytes, as hex."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from blake3 import blake3

__all__ = ["CHUNK_BYTES", "DIGEST_HEX", "chunk_spans", "digest", "digest_of_chunks"]

CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes under one digest; the last chunk of a tensor is shorter."""

DIGEST_HEX = 64
"""Length of a digest as text."""


def digest(data: Any) -> str:
    """BLAKE3 of a bytes-like object, as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def digest_of_chunks(chunks: Iterable[str]) -> str:
    """One digest for a tensor, from those of its chunks."""
    return digest("".join(chunks).encode("ascii"))


def chunk_spans(size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each chunk of `size` bytes; nothing for an empty tensor."""
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, size)
