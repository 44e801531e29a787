"""What is particular to a child of `attempt_forks` that is one rank of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Imported once, for all children: what ranks would import in their midst.
import torch._dynamo
import torch.distributed.checkpoint.default_planner
import torch.distributed.fsdp  # noqa: F401
from support import toy_ranks  # noqa: F401

from ckpt_tasks.events import EventSink
from ckpt_tasks.training import ranked_attempt
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.letters import Proposal, Verdict
from ckpt_tasks.training.ranks.messages import RankMessages
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainSpec


def make_runner(
    spec: TrainSpec, on_event: EventSink, folder: AttemptFolder, place: RankPlace
) -> ranked_attempt.RankedAttempt:
    """As a trainer makes it."""
    every = spec.config.schedule.every_steps
    assert every is not None

    def make_agreement(*args: Any, **options: Any) -> RankAgreement:
        return _PacedAgreement(every, *args, **options)

    ranked_attempt.RankAgreement = make_agreement  # type: ignore[misc, assignment]
    return ranked_attempt.RankedAttempt(spec, on_event, folder, place)


class _PacedAgreement(RankAgreement):
    """Training waits at each boundary for the word on the save that comes next.

    So saves lie at the same steps always, and have the same numbers, as operations have, however
    long a message takes.
    """

    def __init__(self, every_steps: int, *args: Any, **options: Any) -> None:
        self._every_steps = every_steps
        self._known: set[int] = set()
        self._is_deaf = False
        super().__init__(*args, **options)

    def at_step(self, step: int) -> Any:
        save = super().at_step(step)
        following = (step // self._every_steps + 1) * self._every_steps
        with self._changed:
            self._changed.wait_for(lambda: self._is_deaf or following in self._known)
        return save

    def _take(self, proposal: Proposal, verdict: Verdict) -> None:
        super()._take(proposal, verdict)
        with self._changed:
            self._known.add(proposal.step)
            self._changed.notify_all()

    def _until_closed(self, task: Callable[[RankMessages], None], messages: RankMessages) -> None:
        try:
            super()._until_closed(task, messages)
        finally:
            with self._changed:
                self._is_deaf = True
                self._changed.notify_all()
