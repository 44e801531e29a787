"""What ranks hold in common is written by one of them, spread over all.

Nothing is taken on trust: that two ranks hold the same is not derived from how a module is
wrapped (after ``no_sync``, or with a running mean of its own, DDP's ranks differ), but compared,
at every save. When the plan is made, ranks exchange the digests of what may be common; what is
equal is then written by one rank, chosen by torch.distributed.checkpoint's planner. From then
on, while names, shapes, dtypes and placements stay, nothing is exchanged: each rank digests its
own values of what another one writes, and puts the digest into its index; who commits compares
it with the digest of what was written, and refuses where they differ (`checkpointer.gather`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest, digest_of_chunks
from ckpt_tasks.format.records import SharedTensor
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.state.tensors import TensorImage

__all__ = ["Exchange", "RankState", "SharingPlanner"]

Exchange = Callable[[bytes], "Sequence[bytes] | None"]
"""Gives every rank's message, by rank, for this rank's own; ``None`` where one did not come in
time. No collective: it must return even where a rank never calls it.
"""

_THREADS = min(4, os.cpu_count() or 1)
_ALONE_BYTES = 1024 * 1024  # below it a second thread costs more than it saves
_OWN_PREFIX = "ckpt_tasks"  # random generators and counters: per rank, and small

_Owner = tuple[int, str, str]
"""Rank that writes a tensor, and item and key under which it does."""


class RankState(CapturedState):
    """One rank's state as it is staged: its trees, and the tensors that it writes itself.

    Parameters
    ----------
    captured
        The rank's whole state. Positions in its trees and row blocks count all its tensors.
    owners
        Position of each tensor that another rank writes, to that rank and the name it gives it.
    found
        Digests of those that have been taken already, at this boundary.

    Attributes
    ----------
    left
        The tensors that other ranks write, by position. They are not copied, but digested.
    """

    __slots__ = ("_found", "_owners", "left")

    def __init__(
        self, captured: CapturedState, owners: Mapping[int, _Owner], found: Mapping[int, str]
    ) -> None:
        tensors = captured.tensors
        kept = [tensor for position, tensor in enumerate(tensors) if position not in owners]
        super().__init__(captured.trees, kept, captured.row_blocks)
        self.left = {position: tensors[position] for position in sorted(owners)}
        self._owners = owners
        self._found = {position: found[position] for position in owners if position in found}

    @property
    def shared(self) -> Sequence[SharedTensor]:
        """Each tensor that is left, with the digest of this rank's own values."""
        return [
            SharedTensor(
                position=position, rank=rank, item=item, key=key, digest=self._found[position]
            )
            for position, (rank, item, key) in sorted(self._owners.items())
        ]

    def compare(self, positions: Iterable[int]) -> None:
        """Take the digests of those of `left`, as they are now."""
        missing = [position for position in positions if position not in self._found]
        self._found.update(digests(self.left, missing))

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        """Copy what this rank writes, and digest the rest."""
        super().copy_into(buffer, offsets)
        self.compare(self.left)


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that other ranks may hold too, as ranks tell one another."""

    item: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None
    nbytes: int
    digest: str

    @property
    def name(self) -> str:
        """Equal for what is the same on two ranks, values included."""
        return repr((self.item, self.key, self.dtype, self.shape, self.offsets, self.digest))


class SharingPlanner:
    """Decides which of a rank's tensors another rank writes; plans once for states alike.

    Parameters
    ----------
    rank, world_size
        Of this process.
    exchange
        See `Exchange`. Called when a plan is made, by every rank at the same save.
    """

    def __init__(self, rank: int, world_size: int, exchange: Exchange) -> None:
        self._rank = rank
        self._world_size = world_size
        self._exchange = exchange
        self._fingerprint: object = None
        self._owners: Mapping[int, _Owner] = {}

    def forget(self) -> None:
        """Plan anew at the next save: values that were equal may differ now."""
        self._fingerprint = None

    def divide(self, captured: CapturedState) -> RankState:
        """Leave to other ranks what they write.

        Parameters
        ----------
        captured
            This rank's whole state. It must not change while a plan is made.
        """
        fingerprint = [(t.item, t.key, t.dtype, t.shape, t.part) for t in captured.tensors]
        found: Mapping[int, str] = {}
        if self._fingerprint is None or fingerprint != self._fingerprint:
            found = self._plan(captured, fingerprint)
        return RankState(captured, self._owners, found)

    def _plan(self, captured: CapturedState, fingerprint: object) -> Mapping[int, str]:
        """Ask the other ranks; the digests of what was offered to them."""
        self._fingerprint, self._owners = None, {}
        offered = [i for i, tensor in enumerate(captured.tensors) if _may_be_common(tensor)]
        found = digests(captured.tensors, offered)
        own = {i: _offer(captured.tensors[i], found[i]) for i in offered}
        messages = self._exchange(msgspec.msgpack.encode(list(own.values())))
        self._fingerprint = fingerprint
        if messages is None or len(messages) != self._world_size:
            # This rank writes all of its own, whatever the others expect; and asks nobody again
            # before all plan anew, or it would wait at every save for ranks that need no plan.
            return found
        offers = [msgspec.msgpack.decode(data, type=list[_Offer]) for data in messages]
        self._owners = _owners(self._rank, own, offers)
        return found


def _may_be_common(tensor: TensorImage) -> bool:
    if tensor.item.startswith(_OWN_PREFIX) or not tensor.nbytes:
        return False
    return tensor.part is None or tensor.part.replicated


def _offer(tensor: TensorImage, found: str) -> _Offer:
    offsets = None if tensor.part is None else tensor.part.offsets
    return _Offer(
        tensor.item, tensor.key, tensor.dtype, tensor.shape, offsets, tensor.nbytes, found
    )


def _owners(
    rank: int, own: Mapping[int, _Offer], offers: Sequence[Sequence[_Offer]]
) -> dict[int, _Owner]:
    """Position of each tensor that another rank writes, to that rank and the name it gives it.

    Every rank computes it from the same messages, so all come to the same result.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import SavePlan

    planner = DefaultSavePlanner(flatten_state_dict=False)
    plans, _ = planner.create_global_plan(
        [SavePlan([_write_item(offer) for offer in of_rank]) for of_rank in offers]
    )
    writer_of = {item.index.fqn: number for number, plan in enumerate(plans) for item in plan.items}
    owners = {}
    for position, offer in own.items():
        writer = writer_of.get(offer.name)
        if writer is None:
            raise StateError(f"the ranks' plan for a save lacks {offer.item}[{offer.key!r}]")
        if writer != rank:
            owners[position] = writer, offer.item, offer.key
    return owners


def _write_item(offer: _Offer) -> Any:
    """As DCP plans it: a tensor of so many bytes, the same where the name is the same."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    size = torch.Size((offer.nbytes,))
    nowhere = torch.Size((0,))
    return WriteItem(
        index=MetadataIndex(offer.name, nowhere),
        type=WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=nowhere, sizes=size),
            properties=TensorProperties(dtype=torch.uint8),
            size=size,
        ),
    )


_Tensors = Sequence[TensorImage] | Mapping[int, TensorImage]


def digests(tensors: _Tensors, positions: Iterable[int]) -> dict[int, str]:
    """`digest_of_chunks` of tensors, by position; of many bytes, by several threads."""
    chosen = sorted(positions, key=lambda position: tensors[position].nbytes)
    if sum(tensors[position].nbytes for position in chosen) < _ALONE_BYTES:
        return _digests(tensors, chosen)
    found: dict[int, str] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="compare") as pool:
        # Dealt out in the order of their sizes, so that every thread gets as much.
        shares = [chosen[first::_THREADS] for first in range(_THREADS)]
        for of_share in pool.map(partial(_digests, tensors), shares):
            found.update(of_share)
    return found


def _digests(tensors: _Tensors, positions: Iterable[int]) -> dict[int, str]:
    return {position: _digest(tensors[position]) for position in positions}


def _digest(image: TensorImage) -> str:
    flat = image.data.reshape(-1).view(torch.uint8)
    if image.nbytes <= CHUNK_BYTES:
        return digest_of_chunks([_chunk_digest(flat)])
    spans = chunk_spans(image.nbytes)
    return digest_of_chunks(_chunk_digest(flat[start:stop]) for start, stop in spans)


def _chunk_digest(flat: torch.Tensor) -> str:
    """Of up to `CHUNK_BYTES`; what lies on a device comes over one chunk at a time."""
    return digest((flat if flat.is_cpu else flat.cpu()).numpy())
