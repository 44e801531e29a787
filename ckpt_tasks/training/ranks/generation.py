"""How the trainers of one start of torchrun's workers find one another.

Through torchrun's store they find where rank 0 is, and their supervisors join its supervisor there
(see `training.supervision.coordinator`). What that store holds may be of an earlier start, whose
supervisor is gone, or accepts nobody any more: then they look again.

All else goes through a store that rank 0 serves for this start alone, the messages of the user's
process groups too. torchrun's is kept over restarts (torch 2.13), and a rank that comes to
``init_process_group`` first finds there the addresses of dead ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ckpt_tasks.errors import StoreError
from ckpt_tasks.training.ranks.messages import connect_ranks, store_errors
from ckpt_tasks.training.spec import AttemptFolder, Leader, RankPlace

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

__all__ = ["connect_generation"]

_LEADER = "ckpt_tasks/leader"
_POLL_SECONDS = 0.1


def connect_generation(
    folder: AttemptFolder,
    place: RankPlace,
    *,
    seconds: float,
    check: Callable[[], None] = lambda: None,
) -> TCPStore:
    """The store that all ranks of this start talk through, and no others.

    Changes this process's environment, so that ``init_process_group`` uses it, too.

    Parameters
    ----------
    folder
        In which this rank's supervisor says where it listens, or that it was accepted.
    seconds
        How long to wait for rank 0 to come up.
    check
        Called again and again meanwhile; may raise.

    Raises
    ------
    StoreError
        Rank 0, or the store, was not there in time.
    """
    served_here = place.rank == 0 and not place.served
    board = connect_ranks(place.host, place.port, serve=served_here)
    if place.rank == 0:
        own = connect_ranks(place.host, 0, serve=True) if place.served else board
        _lead(folder, board, own.port)
    else:
        leader = _follow(folder, place, board, seconds=seconds, check=check)
        own = connect_ranks(place.host, leader.messages, serve=False)
    os.environ["MASTER_PORT"] = str(own.port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
    return own


def _lead(folder: AttemptFolder, board: Store, messages: int) -> None:
    """Say where rank 0 is, in place of what an earlier start has said."""
    leader = folder.read_leader(folder.leader)
    assert leader is not None, "the supervisor writes it before it starts a trainer"
    leader = msgspec.structs.replace(leader, messages=messages)
    with store_errors():
        board.set(_LEADER, msgspec.json.encode(leader))  # type: ignore[arg-type]


def _follow(
    folder: AttemptFolder,
    place: RankPlace,
    board: Store,
    *,
    seconds: float,
    check: Callable[[], None],
) -> Leader:
    """Have this rank's supervisor join whoever leads, until one has accepted it."""
    give_up_at = time.monotonic() + seconds
    while (joined := folder.read_leader(folder.joined)) is None:
        check()
        _look_up(folder, board)
        if time.monotonic() >= give_up_at:
            raise StoreError(_not_joined(folder, place, seconds))
        time.sleep(_POLL_SECONDS)
    return joined


def _look_up(folder: AttemptFolder, board: Store) -> None:
    with store_errors():
        if not board.check([_LEADER]):
            return
        found = msgspec.json.decode(bytes(board.get(_LEADER)), type=Leader)
    if found != folder.read_leader(folder.leader):
        folder.write_leader(found, folder.leader)


def _not_joined(folder: AttemptFolder, place: RankPlace, seconds: float) -> str:
    found = folder.read_leader(folder.leader)
    if found is None:
        where = f"has not said where it is ({place.host}:{place.port})"
    else:
        where = f"was not reached, or accepted nobody, at {found.host}:{found.port}"
    return f"rank {place.rank} has waited {seconds:.0f} s for rank 0, which {where}"
