"""Worlds of several ranks: real processes with gloo on this machine, each within a time-out.

torch takes seconds to import. A fork server does so once; ranks are forked from it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint",
        "torch._dynamo",  # which optimizers import when they first step
        "support.sharded_runs",
    ]
)

SECONDS = 120.0


def run_world(
    world_size: int,
    function: Callable[..., Any],
    folder: Path,
    *args: Any,
    seconds: float = SECONDS,
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in as many processes; what each returned, by rank.

    Raises `AssertionError` with the traceback of the first rank that raised, or that has not
    ended in time; all processes have ended then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    ends = []
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(rank, world_size, str(meeting), there, function, args), daemon=True
        )
        process.start()
        there.close()
        ends.append((process, here))
    try:
        return _results(ends, time.monotonic() + seconds)
    finally:
        for process, here in ends:
            process.kill()
            process.join()
            here.close()


def _results(ends: list[Any], give_up_at: float) -> list[Any]:
    results = []
    for rank, (_, here) in enumerate(ends):
        if not here.poll(max(0.0, give_up_at - time.monotonic())):
            raise AssertionError(f"rank {rank} has not ended in time")
        try:
            failed, result = pickle.loads(here.recv_bytes())  # noqa: S301 - of our own process
        except EOFError as error:
            raise AssertionError(f"rank {rank} died") from error
        if failed:
            raise AssertionError(f"rank {rank}: {result}")
        results.append(result)
    return results


def _rank(
    rank: int, world_size: int, meeting: str, end: Any, function: Callable[..., Any], args: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(rank, world_size, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        end.send_bytes(pickle.dumps((True, traceback.format_exc())))
        raise
    # Not send(): torch would hand out tensors in memory that ends with this process.
    end.send_bytes(pickle.dumps((False, result)))
