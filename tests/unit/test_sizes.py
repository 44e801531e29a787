"""Sizes as people read them."""

from __future__ import annotations

import pytest

from ckpt_tasks.sizes import readable_size


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
