"""Attempts of several ranks, each a child of `attempt_forks`, supervised as the product's are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import psutil
from support.attempt_forks import SHOW_STACKS, AttemptForks, Fork
from support.faulty_attempt import STRUCK
from support.launches import PATIENCE

from ckpt_tasks.checkpointer.failures import tell_failure
from ckpt_tasks.events import Event
from ckpt_tasks.training.spec import AttemptFolder, RankPlace, TrainOutcome, TrainSpec
from ckpt_tasks.training.supervision import trainers as supervision
from ckpt_tasks.training.supervision.trainers import Trainers

_FAREWELL_SECONDS = 1.0
_POLL_SECONDS = 0.01


class RankedFork:
    """The ranks of one attempt, to be used as a `Fork`.

    Parameters
    ----------
    children
        By rank.
    struck
        The rank whose operations are counted and struck.

    Attributes
    ----------
    pid
        Rank 0's, which claims.
    """

    def __init__(self, folder: Path, children: Sequence[Fork], struck: int) -> None:
        self._folder = AttemptFolder(folder)
        self._children = children
        self._struck = children[struck]
        self.pid = children[0].pid
        self._processes = {rank: _Child(fork) for rank, fork in enumerate(children)}
        self.hung = ""
        """Where each rank stood, if they have not ended in time."""

    def wait(self) -> RankedFork:
        """Return when all have ended, as a supervisor has them end, and their writers."""
        with patch.object(supervision, "_FAREWELL_SECONDS", _FAREWELL_SECONDS):
            trainers: Any = Trainers(self._folder, self._processes)  # type: ignore[arg-type]
            give_up_at = time.monotonic() + PATIENCE
            trainers.look()
            while trainers.are_running and not self.hung:
                time.sleep(_POLL_SECONDS)
                trainers.look()
                if time.monotonic() > give_up_at:
                    self.hung = self._stand()
            trainers.kill()
            self._wait_for_writers(trainers, give_up_at)
        self._decisive = trainers.decisive
        return self

    def _wait_for_writers(self, trainers: Trainers, give_up_at: float) -> None:
        told = False
        while self._folder.has_live_writer():
            if not told and trainers.others_are_over:
                told = True
                tell_failure(self._folder.failures, None, "no other rank runs any more")
            if time.monotonic() > give_up_at:
                self.hung = self.hung or "a writer still runs"
                self._folder.end_writers()
            time.sleep(_POLL_SECONDS)

    def _stand(self) -> str:
        """Where each rank stands."""
        left = [rank for rank, child in self._processes.items() if child.returncode is None]
        for rank in left:
            os.kill(self._children[rank].pid, SHOW_STACKS)
        time.sleep(1.0)
        return f"ranks {left} have not ended within {PATIENCE:.0f} s:\n{self.output}"

    @property
    def outcome(self) -> TrainOutcome:
        """That of the rank whose end is the attempt's."""
        child = self._children[self._decisive]
        if child.has_outcome:
            return child.outcome
        how = self._processes[self._decisive].returncode
        return TrainOutcome(code=1, message=f"rank {self._decisive} ended with {how}", run="")

    @property
    def output(self) -> str:
        return self._children[0].output

    def events_of(self, kind: type[Event]) -> list[Event]:
        """Rank 0's."""
        return self._children[0].events_of(kind)

    @property
    def operations(self) -> list[tuple[str, str]]:
        return self._struck.operations

    @property
    def met(self) -> tuple[str, str] | None:
        """The operation that a fault has struck, if it has."""
        told = self._struck.folder / STRUCK
        return (
            msgspec.json.decode(told.read_bytes(), type=tuple[str, str]) if told.exists() else None
        )

    @property
    def held(self) -> bool:
        return self._struck.held

    def let_go(self) -> None:
        self._struck.let_go()


class _Child:
    """A fork, as `Trainers` knows it."""

    def __init__(self, fork: Fork) -> None:
        self._fork = fork
        self._returned: int | None = None

    @property
    def returncode(self) -> int | None:
        if self._returned is None and not psutil.pid_exists(self._fork.pid):
            self._returned = os.waitstatus_to_exitcode(self._fork.wait().status)
        return self._returned

    def kill(self) -> None:
        if self.returncode is None:
            os.killpg(self._fork.pid, signal.SIGKILL)
            self._returned = os.waitstatus_to_exitcode(self._fork.wait().status)


def start_ranks(
    forks: AttemptForks,
    spec: TrainSpec,
    *,
    environment: Mapping[str, str],
    struck: int = 0,
    **options: Any,
) -> RankedFork:
    """Fork a child for each rank of an attempt; returns while they run.

    Parameters
    ----------
    struck
        The rank that `options`, as `AttemptForks.start` takes them, are of. Rank 0 registers.
    """
    folder = forks.new_folder()
    ports = supervision._free_ports(2)
    children = []
    for rank in range(spec.nproc):
        own = folder / f"rank-{rank}"
        own.mkdir()
        children.append(
            forks.start(
                spec,
                folder=own,
                place=RankPlace(rank=rank, ranks=spec.nproc, port=ports[0]),
                environment={
                    **supervision._environment(rank, spec.nproc, ports[1]),
                    "GLOO_SOCKET_IFNAME": "lo",
                    **environment,
                },
                registers=rank == 0,
                **(options if rank == struck else {}),
            )
        )
    return RankedFork(folder, children, struck)
