"""The trainers of one attempt: a process for each rank, which live and die together.

The environment is torchrun's (https://docs.pytorch.org/docs/stable/elastic/run.html), so that
training code that runs under it runs here.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import IO

from ckpt_tasks.training.child import Child
from ckpt_tasks.training.spec import AttemptFolder, RankPlace
from ckpt_tasks.types import EXIT_DONE, EXIT_STOPPED

__all__ = ["Trainers"]

_WELL = (None, EXIT_DONE, EXIT_STOPPED)
_FAREWELL_SECONDS = 10.0
"""For the others, once a rank has failed: most wait for it in a collective, and would for ever."""


class Trainers:
    """Starts one trainer for each rank."""

    def __init__(self, folder: AttemptFolder, ranks: int, output: IO[bytes]) -> None:
        ports = _free_ports(2)
        self._children = [
            Child(
                "ckpt_tasks.training.trainer",
                folder.of_rank(rank),
                output,
                name=folder.of_rank(rank).trainer_name,
                arguments=_place(rank, ranks, ports[0]),
                environment=_environment(rank, ranks, ports[1]),
            )
            for rank in range(ranks)
        ]
        self._failed: int | None = None
        self._end_by: float | None = None

    @property
    def are_running(self) -> bool:
        """Whether any of them is; those that wait for one that failed are ended after a while."""
        if self._failed is None:
            self._failed = self._first_failed()
            if self._failed is not None:
                self._end_by = time.monotonic() + _FAREWELL_SECONDS
        if self._end_by is not None and time.monotonic() > self._end_by:
            self._end_by = None
            self.kill()
        return any(child.process.poll() is None for child in self._children)

    def _first_failed(self) -> int | None:
        """Of several that are seen to have failed at once, one that was killed: the others' errors
        are that they miss it.
        """
        ended = [(child.process.poll(), rank) for rank, child in enumerate(self._children)]
        failed = [(code, rank) for code, rank in ended if code not in _WELL]
        return min(failed, key=lambda end: end[0] >= 0)[1] if failed else None

    @property
    def decisive(self) -> int:
        """The rank whose end is the attempt's: the first that failed, else rank 0."""
        return 0 if self._failed is None else self._failed

    @property
    def returncode(self) -> int:
        """Of the decisive one; negative for a signal."""
        returned: int = self._children[self.decisive].process.returncode
        return returned

    @property
    def ended_by_signal(self) -> bool:
        """Whether all of them ended by SIGTERM, to which they did not listen yet."""
        return all(child.process.returncode == -signal.SIGTERM for child in self._children)

    def terminate(self) -> None:
        """Have each save and stop."""
        for child in self._children:
            if child.process.poll() is None:
                child.process.terminate()

    def kill(self) -> None:
        """End them, and what they have started, at once."""
        for child in self._children:
            child.kill()


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
