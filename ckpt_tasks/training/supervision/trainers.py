"""The trainers of one attempt: a process for each rank, which live and die together.

`Trainers` starts all of them on this machine. The environment is torchrun's
(https://docs.pytorch.org/docs/stable/elastic/run.html), so that training code that runs under it
runs here. Where torchrun itself has started a launcher for each rank, a supervisor has one trainer,
and hears of the others' (`LeadingTrainer`, `FollowingTrainer`).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import IO

from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec
from ckpt_tasks.training.supervision.child import Child
from ckpt_tasks.training.supervision.coordinator import Coordinator, Ended, Member
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

__all__ = ["FollowingTrainer", "LeadingTrainer", "Trainers", "start_trainers"]

_MODULE = "ckpt_tasks.training.trainer"

_WELL = (None, EXIT_DONE, EXIT_STOPPED)
_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 10.0
"""For the others, once a rank has failed: most wait for it in a collective, and would for ever."""


class Trainers:
    """One trainer for each rank, here.

    Parameters
    ----------
    children
        By rank.
    """

    def __init__(self, folder: AttemptFolder, children: Mapping[int, Child]) -> None:
        self._folder = folder
        self._children = children
        self._failed: int | None = None
        self._end_by: float | None = None

    def look(self) -> None:
        """Note which has failed; those that wait for it are ended after a while."""
        if self._failed is None:
            self._failed = self._first_failed()
            if self._failed is not None:
                self._end_by = time.monotonic() + _FAREWELL_SECONDS
        if self._end_by is not None and time.monotonic() > self._end_by:
            self._end_by = None
            self.kill()

    @property
    def are_running(self) -> bool:
        """Whether any of them is."""
        return any(child.returncode is None for child in self._children.values())

    def _ends(self) -> list[tuple[int | None, int]]:
        """How each has ended, if it has, and its rank."""
        return [(child.returncode, rank) for rank, child in self._children.items()]

    def _first_failed(self) -> int | None:
        """Of several that are seen to have failed at once, one that was killed: the others' errors
        are that they miss it.
        """
        failed = [(code, rank) for code, rank in self._ends() if code not in _WELL]
        return min(failed, key=lambda end: end[0] is None or end[0] >= 0)[1] if failed else None

    @property
    def decisive(self) -> int:
        """The rank whose end is the attempt's: the first that failed, else rank 0."""
        return 0 if self._failed is None else self._failed

    @property
    def returncode(self) -> int:
        """Of the decisive one; negative for a signal."""
        return self._returncode(self.decisive)

    def _returncode(self, rank: int) -> int:
        returned = self._children[rank].returncode
        assert returned is not None
        return returned

    @property
    def said(self) -> TrainOutcome | None:
        """The decisive one's outcome, if it could say it itself."""
        return self._said(self.decisive)

    def _said(self, rank: int) -> TrainOutcome | None:
        folder = self._folder.of_rank(rank)
        return folder.read_outcome(folder.trainer_outcome)

    @property
    def ended_by_signal(self) -> bool:
        """Whether all of them ended by SIGTERM, to which they did not listen yet."""
        returned = [child.returncode for child in self._children.values()]
        return all(code == -signal.SIGTERM for code in returned)

    @property
    def others_are_over(self) -> bool:
        """Whether nothing of any rank but 0 runs any more, to make its part of a save."""
        alone = len(self._children) == 1
        return not alone and not self.are_running and not self._folder.has_live_writer_but_own()

    def terminate(self) -> None:
        """Have each save and stop."""
        for child in self._children.values():
            if child.returncode is None:
                child.process.terminate()

    def kill(self) -> None:
        """End them, and what they have started, at once."""
        for child in self._children.values():
            child.kill()

    def agree(self, outcome: TrainOutcome, has_time: Callable[[], bool]) -> TrainOutcome:
        """The attempt's outcome, where this is what was seen of it here."""
        return outcome

    def close(self) -> None:
        """No word of theirs is needed any more."""


class LeadingTrainer(Trainers):
    """Rank 0's trainer, and what other supervisors tell of theirs."""

    def __init__(
        self, folder: AttemptFolder, children: Mapping[int, Child], coordinator: Coordinator
    ) -> None:
        super().__init__(folder, children)
        self._coordinator = coordinator

    def look(self) -> None:
        self._coordinator.look()
        known = self._failed
        super().look()
        if self._failed is not None and known is None:
            self._coordinator.refuse()
            self._coordinator.tell_failed(self._failed)

    @property
    def are_running(self) -> bool:
        return super().are_running or bool(self._coordinator.running)

    def _ends(self) -> list[tuple[int | None, int]]:
        told = [(end.returncode, rank) for rank, end in self._coordinator.ends.items()]
        return [*super()._ends(), *told]

    def _returncode(self, rank: int) -> int:
        return self._coordinator.ends[rank].returncode if rank else super()._returncode(0)

    def _said(self, rank: int) -> TrainOutcome | None:
        return self._coordinator.ends[rank].outcome if rank else super()._said(0)

    @property
    def others_are_over(self) -> bool:
        self._coordinator.look()
        return self._coordinator.all_are_over

    def terminate(self) -> None:
        self._coordinator.refuse()
        super().terminate()

    def kill(self) -> None:
        super().kill()
        self._coordinator.give_up()

    def agree(self, outcome: TrainOutcome, has_time: Callable[[], bool]) -> TrainOutcome:
        self._coordinator.tell_final(outcome)
        return outcome

    def close(self) -> None:
        self._coordinator.close()


class FollowingTrainer(Trainers):
    """Another rank's trainer, of which rank 0's supervisor is told, and which ends with it."""

    def __init__(
        self, folder: AttemptFolder, children: Mapping[int, Child], member: Member, run: str
    ) -> None:
        super().__init__(folder, children)
        (self._rank,) = children
        self._member = member
        self._run = run
        self._told = self._was_ended = False

    def look(self) -> None:
        self._member.look()
        super().look()
        returned = self._children[self._rank].returncode
        if returned is not None and self._member.has_joined and not self._told:
            self._told = True
            self._member.tell_ended(Ended(returned, self._said(self._rank)))

    def _ends(self) -> list[tuple[int | None, int]]:
        told = self._member.failed if not self._member.is_lost else 0
        return [*super()._ends(), *([(EXIT_FAILED, told)] if told is not None else [])]

    @property
    def decisive(self) -> int:
        return self._rank

    def _said(self, rank: int) -> TrainOutcome | None:
        said = self._folder.read_outcome(self._folder.trainer_outcome)
        if said is None and self._was_ended:
            why = "the trainer was ended, as it had not stopped in time"
            said = TrainOutcome(code=EXIT_FAILED, message=why, run=self._run)
        return said

    @property
    def others_are_over(self) -> bool:
        return False  # rank 0 asks

    def kill(self) -> None:
        self._was_ended = self._was_ended or self.are_running
        super().kill()

    def agree(self, outcome: TrainOutcome, has_time: Callable[[], bool]) -> TrainOutcome:
        """Rank 0's supervisor says it, which waits for its writer first."""
        if not self._folder.has_live_writer():
            self._member.tell_over()
        while self._member.has_joined and self._member.final is None:
            self._member.look()
            if self._member.is_lost or not has_time():
                break
            time.sleep(_POLL_SECONDS)
        return self._member.final or outcome

    def close(self) -> None:
        self._member.close()


def start_trainers(folder: AttemptFolder, spec: TrainSpec, output: IO[bytes]) -> Trainers:
    """Start those that `spec` wants to have started here."""
    place = spec.place
    if place is None:
        return Trainers(folder, _start_all(folder, spec.nproc, output))
    if place.rank == 0:
        coordinator = Coordinator(place, spec.run)
        folder.write_leader(coordinator.leader, folder.leader)
        return LeadingTrainer(folder, _start_one(folder, place, output), coordinator)
    member = Member(folder, place.rank)
    return FollowingTrainer(folder, _start_one(folder, place, output), member, spec.run)


def _start_one(folder: AttemptFolder, place: RankPlace, output: IO[bytes]) -> dict[int, Child]:
    """In torchrun's own environment, which this process has inherited."""
    return {place.rank: Child(_MODULE, folder, output, name=folder.trainer_name)}


def _start_all(folder: AttemptFolder, ranks: int, output: IO[bytes]) -> dict[int, Child]:
    ports = _free_ports(2)
    return {
        rank: Child(
            _MODULE,
            folder.of_rank(rank),
            output,
            name=folder.of_rank(rank).trainer_name,
            arguments=_place(rank, ranks, ports[0]),
            environment=_environment(rank, ranks, ports[1]),
        )
        for rank in range(ranks)
    }


def _place(rank: int, ranks: int, port: int) -> list[str]:
    return RankPlace(rank=rank, ranks=ranks, port=port).to_arguments() if ranks > 1 else []


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As torchrun does: the ranks share the machine's processors.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
