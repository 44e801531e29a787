"""What is particular to a child of `attempt_forks` that is one rank of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Imported once, for all children: what ranks would import in their midst.
import torch._dynamo
import torch.distributed.checkpoint.default_planner
import torch.distributed.fsdp  # noqa: F401
from support import toy_ranks

from ckpt_tasks.events import EventSink
from ckpt_tasks.training import ranked_attempt
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.letters import Proposal, Verdict
from ckpt_tasks.training.ranks.messages import RankMessages
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainSpec
from ckpt_tasks.types import SaveDecision


def make_runner(
    spec: TrainSpec, on_event: EventSink, folder: AttemptFolder, place: RankPlace
) -> ranked_attempt.RankedAttempt:
    """As a trainer makes it."""
    every = spec.config.schedule.every_steps
    assert every is not None
    steps = spec.params["epochs"] * toy_ranks.SAMPLES // (toy_ranks.BATCH * place.ranks)

    def make_agreement(*args: Any, **options: Any) -> RankAgreement:
        return _PacedAgreement(range(0, steps + 1, every), *args, **options)

    ranked_attempt.RankAgreement = make_agreement  # type: ignore[misc, assignment]
    return ranked_attempt.RankedAttempt(spec, on_event, folder, place)


class _PacedAgreement(RankAgreement):
    """Training waits at each boundary for the word on the save that comes next.

    So saves lie at the same steps always, and have the same numbers, as operations have, however
    long a message takes.

    Parameters
    ----------
    saved_steps
        None is asked for beyond: whether the last save knows that it is dropped would be luck.
    """

    def __init__(self, saved_steps: Sequence[int], *args: Any, **options: Any) -> None:
        self._saved_steps = saved_steps
        self._known: set[int] = set()
        self._is_deaf = False
        super().__init__(*args, **options)

    def at_step(self, step: int) -> Any:
        save = super().at_step(step)
        following = next((other for other in self._saved_steps if other > step), None)
        with self._changed:
            self._changed.wait_for(
                lambda: following is None or self._is_deaf or following in self._known
            )
        return save

    def ask(self, decision: SaveDecision, *, step: int | None = None) -> None:
        if step is None or step in self._saved_steps:
            super().ask(decision, step=step)

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
