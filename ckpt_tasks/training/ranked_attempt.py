"""One rank of an attempt on many: rank 0 claims and chooses, all start, save and end together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ckpt_tasks.checkpointer.failures import tell_failure
from ckpt_tasks.errors import AttemptFailedError
from ckpt_tasks.events import EventSink
from ckpt_tasks.fencing.claim import Attempt, read_run
from ckpt_tasks.format.records import IndexRef, RunRecord
from ckpt_tasks.recovery.recover import Recovered, Start, recover
from ckpt_tasks.store.base import Store
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.ranked_saver import Ranks
from ckpt_tasks.training.ranks.agreement import RankAgreement
from ckpt_tasks.training.ranks.generation import connect_generation
from ckpt_tasks.training.ranks.messages import connect_ranks
from ckpt_tasks.training.ranks.recovery import RankedRecovery
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as MessageStore

__all__ = ["RankedAttempt"]

_JOIN_SECONDS = 600.0
"""For machines that come up later, as torchrun's own agents wait for one another."""


class RankedAttempt(AttemptRunner):
    """Executes a run once, as one of several ranks.

    Parameters
    ----------
    folder
        The attempt's folder, as this rank uses it.
    place
        Which rank this is.
    """

    def __init__(
        self, spec: TrainSpec, on_event: EventSink, folder: AttemptFolder, place: RankPlace
    ) -> None:
        super().__init__(spec, on_event, folder)
        self._place = place
        self._own_folder = folder
        self._agreement: RankAgreement
        self._recovery: RankedRecovery
        self._has_begun = False

    def _execute(self, store: Store, function: Callable[..., Any]) -> TrainOutcome:
        place, leads = self._place, self._place.rank == 0
        self._agreement = RankAgreement(
            self._connect(),
            place.rank,
            place.ranks,
            # Longer than ranks run apart, as where one evaluates; one that died is noticed by
            # the supervisor.
            seconds=self._spec.config.attempt.max_unprotected,
            on_failure=partial(tell_failure, self._own_folder.failures),
        )
        try:
            self._recovery = RankedRecovery(store, self._layout, self._agreement)
            return self._lead(store, function) if leads else self._follow(store, function)
        finally:
            self._agreement.close()

    def _connect(self) -> MessageStore:
        place = self._place
        if self._spec.place is None:
            return connect_ranks(place.host, place.port, serve=place.rank == 0)
        return connect_generation(
            self._own_folder, place, seconds=_JOIN_SECONDS, check=self._stop_if_requested
        )

    def _lead(self, store: Store, function: Callable[..., Any]) -> TrainOutcome:
        """As the only rank does; the others are told if nothing is trained."""
        try:
            outcome = super()._execute(store, function)
        except BaseException as error:
            if not self._has_begun:
                self._recovery.stop(f"{type(error).__name__}: {error}")
            raise
        if not self._has_begun:
            self._recovery.stop(outcome.message)
        return outcome

    def _follow(self, store: Store, function: Callable[..., Any]) -> TrainOutcome:
        try:
            recovered = self._recovery.follow()
        except AttemptFailedError as error:
            # Rank 0 says why, and its word counts.
            return TrainOutcome(code=EXIT_DONE, message=str(error), run=self._spec.run)
        run = self._make_run(store, read_run(store, self._layout), recovered)
        if not run.is_finished:
            self._train(run, function)
        run.finish()
        return self._outcome(EXIT_DONE, f"trained to its end: {run.position}")

    def _recover(self, store: Store, identity: RunRecord, attempt: Attempt) -> Recovered:
        recovered = recover(
            store,
            self._layout,
            identity,
            attempt,
            load=self._recovery.load,
            on_event=self._on_event,
        )
        self._recovery.begin(recovered)
        self._has_begun = True
        return recovered

    def _stop_before_training(self) -> None:
        """Perhaps only this rank was asked to: all stop together, at the first boundary."""

    def _ranks(self) -> Ranks:
        return Ranks(self._agreement, self._spec.config.schedule)

    def _saves_of_ranks(self) -> dict[str, Any]:
        nonce = self._agreement.nonce()
        return {
            "unique": lambda: nonce,
            "rank": self._place.rank,
            "world_size": self._place.ranks,
            "gather_seconds": self._spec.config.attempt.max_unprotected,
        }

    def _base(self, start: Start) -> IndexRef | None:
        refs = start.record.indexes
        return refs[self._place.rank] if len(refs) == self._place.ranks else None
