"""Ends the servers of a process that cannot do so itself any more: one killed with SIGKILL.

``python -m ckpt_tasks.demo.watcher`` reads a pipe whose other end only that process holds: it
closes when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import TracebackType

import msgspec

from ckpt_tasks.demo.families import end_families
from ckpt_tasks.fencing.process import process_is_alive
from ckpt_tasks.format.records import Process

__all__ = ["Watcher", "main"]

_GRACE_SECONDS = 5.0


class Watcher:
    """Ends the servers that are left, with all that they have started, when this process ends.

    Or when the block is left. It is in a session of its own: what a terminal sends to the demo
    does not reach it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ckpt_tasks.demo.watcher"],
            bufsize=0,
            stdin=subprocess.PIPE,
            # Not the demo's: who reads those waits until nobody holds them.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def watch(self, leader: Process) -> None:
        """Have it end this process, the first one of a session, and its family."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(leader) + b"\n")


def main() -> None:
    leaders = [msgspec.json.decode(line, type=Process) for line in sys.stdin.buffer]
    end_families(filter(process_is_alive, leaders), grace=_GRACE_SECONDS)


if __name__ == "__main__":
    main()
