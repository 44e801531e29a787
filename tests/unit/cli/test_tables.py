"""Ages and columns for people."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ckpt_tasks.cli.tables import age, age_or_dash, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.4, "0s"), (61, "1m 1s"), (3600, "1h"), (90061, "1d 1h"), (86405, "1d 5s")],
)
def test_ages_show_two_units(seconds, text):
    """The two largest units that are not zero; a clock that runs ahead gives zero."""
    assert age(seconds) == text


def test_a_timestamp_that_cannot_be_read_is_a_dash():
    """A record's damaged time does not stop a listing."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert age_or_dash("2026-01-01T00:00:00.000Z", now=now) == "1d"
    assert age_or_dash("2026-01-01T00:00:00", now=now) == "1d"
    assert age_or_dash("yesterday", now=now) == "-"
    assert age_or_dash(None) == "-"


def test_columns_are_aligned():
    """Text to the left, numbers to the right, nothing behind the last column."""
    assert table(["run", "steps"], [["a", "5"], ["long name", "1200"]], right="steps") == [
        "RUN        STEPS",
        "a              5",
        "long name   1200",
    ]
