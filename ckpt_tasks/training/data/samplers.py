"""A distributed sampler whose place in the data does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["ResumableDistributedSampler"]


class ResumableDistributedSampler(Sampler[int]):
    """Shares a map-style data set among ranks, so that any number of ranks goes on in its midst.

    Used as torch's ``DistributedSampler``. The order of an epoch is one for all ranks, and depends
    on (`seed`, epoch) alone: rank r of n takes every n-th sample of it, beginning with the r-th.
    What n ranks have seen after some batches of the same size is therefore a beginning of that
    order, and its length is the place: whoever goes on, on whatever number of ranks and with
    whatever batch size, shares the rest. Tracked by `TrainingRun.track` with its loader, no
    sample of an epoch is seen twice or missed.

    Two things touch the very end of an epoch only. Ranks must do the same number of batches, so
    where the samples do not divide, each rank's share is filled up with the first of the epoch's
    order, as torch does; with `drop_last` the last few are left out instead. And a loader with
    ``drop_last=True`` leaves out each rank's last incomplete batch.

    Parameters
    ----------
    dataset
        Map-style; only its length is looked at.
    num_replicas, rank
        Default: of the process group, or one process without any.
    shuffle
        False: the data set's own order in each epoch.
    seed
        The same on all ranks and in every attempt.
    drop_last
        See above.

    Raises
    ------
    ValueError
        `rank` is none of `num_replicas`.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if group else 1
        if rank is None:
            rank = torch.distributed.get_rank() if group else 0
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} of {num_replicas} ranks")
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.consumed = 0
        """Samples of the epoch's order that were seen, by all ranks together, before the next
        iteration begins: it yields what is left."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: `TrainingRun.epochs` calls it for loaders that are tracked."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.consumed = 0

    def seen(self, samples: int) -> int:
        """The place, when each rank has seen `samples` since the iteration began."""
        return min(self.consumed + samples * self.num_replicas, len(self.dataset))

    def left(self) -> int:
        """Samples that this rank gets in an iteration that begins now."""
        rest = max(0, len(self.dataset) - self.consumed)
        return rest // self.num_replicas if self.drop_last else -(-rest // self.num_replicas)

    def __len__(self) -> int:
        """Samples that each rank gets in an epoch that is seen from its beginning."""
        total = len(self.dataset)
        return total // self.num_replicas if self.drop_last else -(-total // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        rest = order[self.consumed :]
        wanted = self.left() * self.num_replicas
        if wanted > len(rest):
            filled = order.repeat(-(-wanted // max(len(order), 1)))[: wanted - len(rest)]
            rest = torch.cat([rest, filled])
        yield from rest[self.rank : wanted : self.num_replicas].tolist()

    def describe(self) -> dict[str, Any]:
        """What the order depends on: in its midst, it must not change."""
        return {"shuffle": self.shuffle, "seed": self.seed, "samples": len(self.dataset)}

    def _order(self) -> torch.Tensor:
        total = len(self.dataset)
        if not self.shuffle:
            return torch.arange(total)
        generator = torch.Generator()
        # One number from two, so that (seed 1, epoch 0) is not the order of (seed 0, epoch 1).
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(total, generator=generator)
