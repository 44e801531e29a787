"""What steps that were done again have shown, as tests tell it."""

from __future__ import annotations

from ckpt_tasks.replay import Divergence, Replay

_VALUE = Divergence(key="loss", step=8, first=0.5, replayed=0.75)

IDENTICAL = Replay(steps=37, values=74)
DIVERGED = Replay(
    steps=5,
    values=10,
    diverged_steps=1,
    diverged_values=1,
    first=_VALUE,
    largest=_VALUE,
    largest_relative=_VALUE,
    keys={"loss": 1},
)
