"""How durations and rules of retention are written, by people and in files."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ckpt_tasks.errors import ConfigError

__all__ = ["Best", "Bucket", "parse_best", "parse_bucket", "parse_duration"]

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_PLAIN_SECONDS = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_BEST_OF = re.compile(r"(?:(?P<count>\d{1,9}):)?(?P<metric>.+):(?P<mode>min|max)", re.ASCII)


class Best(msgspec.Struct, frozen=True):
    """So many checkpoints with the best values of a metric."""

    count: int
    metric: str
    mode: Literal["min", "max"]


class Bucket(msgspec.Struct, frozen=True):
    """One checkpoint of every so many seconds (0: all of them), while younger than `within`."""

    every: float
    within: float


def parse_duration(text: str) -> float:
    """Seconds of ``"90s"``, ``"10m"``, ``"1h30m"``, ``"2d"`` or plain ``"600"``.

    Raises ``ValueError`` for anything else.
    """
    stripped = text.strip()
    if _PLAIN_SECONDS.fullmatch(stripped):
        return float(stripped)
    match = _DURATION.fullmatch(stripped)
    if not stripped or match is None:
        raise ValueError(f"{text!r} is not a duration; write '90s', '10m', '1h30m' or seconds")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_best(text: str) -> Best:
    """What ``3:val_loss:min`` or ``val_loss:min`` keeps. Raises `ConfigError`."""
    match = _BEST_OF.fullmatch(text)
    if match is None or match["count"] == "0":
        raise ConfigError(
            f"retention.best = {text!r} does not say how many, or which way is better; write "
            "N:METRIC:min or N:METRIC:max, for example '1:val_loss:min'"
        )
    mode: Literal["min", "max"] = "min" if match["mode"] == "min" else "max"
    return Best(int(match["count"] or 1), match["metric"], mode)


def parse_bucket(text: str) -> Bucket:
    """What ``1h:1d`` or ``all:1h`` keeps. Raises `ConfigError`."""
    every, separator, within = text.partition(":")
    try:
        bucket = Bucket(0.0 if every == "all" else parse_duration(every), parse_duration(within))
    except ValueError as error:
        raise ConfigError(f"retention.buckets = {text!r}: {error}") from error
    if not separator or bucket.within <= bucket.every or (every != "all" and not bucket.every):
        raise ConfigError(
            f"retention.buckets = {text!r} is not EVERY:FOR, the second longer than the first, as "
            "in 'all:1h', '1h:1d' or '1d:30d'"
        )
    return bucket
