"""An attempt of a modelled run as its process holds it, and how the store fails it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from support.run_model import Age

from ckpt_tasks.checkpointer.checkpointer import Checkpointer
from ckpt_tasks.testing import Fault, FaultyStore
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.types import CheckpointId

FOR_EVER = 10**9


@dataclass(frozen=True)
class Cut:
    """The store fails from the `at`-th change on that a process makes, from 1.

    Parameters
    ----------
    after
        The change takes effect, and only its answer is lost.
    times
        How many changes fail. Where all do from then on, the process was killed.
    torn
        Of an object that was being written, a part is left.
    """

    at: int
    after: bool = False
    times: int = FOR_EVER
    torn: bool = False

    @property
    def kills(self) -> bool:
        return self.times == FOR_EVER


@dataclass
class Trainer:
    """An attempt, as its process holds it; it may have been replaced long ago.

    Attributes
    ----------
    queue, opened
        What it has committed and not published; whether it has published before.
    at_commit
        Called once, right before the next commit record is made.
    refused
        Its latest save was refused for what that referred to.
    """

    number: int
    step: int
    store: FaultyStore
    publisher: Publisher
    checkpointer: Checkpointer = field(init=False)
    saves: int = 0
    queue: list[Age] = field(default_factory=list)
    opened: bool = False
    at_commit: Callable[[], object] | None = None
    refused: bool = False


def age_of(checkpoint: CheckpointId | str) -> Age:
    parsed = CheckpointId.parse(checkpoint) if isinstance(checkpoint, str) else checkpoint
    return parsed.attempt, parsed.sequence


def arm(store: FaultyStore, cut: Cut | None) -> float:
    """Let the store fail as told; returns at which operation."""
    if cut is None:
        return float("inf")
    at = store.count + cut.at
    store.faults[:] = [Fault(at=at, when="after" if cut.after else "before", times=cut.times)]
    return at
