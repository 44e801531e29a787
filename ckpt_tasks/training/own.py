"""Names under which this package's own state stands in a checkpoint."""

from __future__ import annotations

from typing import Final

__all__ = ["COUNTERS", "OWN", "RNG", "STATE"]

COUNTERS: Final = "ckpt_tasks.counters"
RNG: Final = "ckpt_tasks.rng"
STATE: Final = "ckpt_tasks.state"

OWN: Final = (COUNTERS, RNG, STATE)
"""All of them: a checkpoint has each."""
