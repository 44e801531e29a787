"""Sizes as people read them."""

from __future__ import annotations

import pytest

from ckpt_tasks.sizes import parse_size, readable_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (3_412_345, "3.41 MB"),
        (20 * 2**20, "21 MB"),
        (999_600_000, "1 GB"),
        (5 * 10**15, "5 PB"),
        (5 * 10**18, "5e+03 PB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    """Decimal units, the largest that leaves a number of at least one."""
    assert readable_size(size) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("500GB", 500 * 10**9), ("1.5 TiB", 3 * 2**39), ("20m", 20 * 10**6), ("7", 7), ("8 b", 8)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Decimal units, or binary ones with an i."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 ib", "-1", "1e9", "5 XB", "1 GB 2 MB"])
def test_other_texts_are_no_sizes(text: str) -> None:
    """With an example of one."""
    with pytest.raises(ValueError, match="write '500GB'"):
        parse_size(text)
