"""What tests of commands are given, called in their own process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from support.made_runs import MadeRun
from support.shell import Answer

Call = Callable[..., Answer]
"""Runs ``ckpt-tasks ARGUMENTS...``."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Ids of the checkpoints of the run ``digits cnn``, and the run."""

    run: MadeRun
    first: str
    zombie: str
    newest: str
