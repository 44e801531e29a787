"""What ranks of a test do: make a model in some sharding, train it, save and restore it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckpt_tasks.checkpointer.checkpointer import Checkpointer, SaveRequest
from ckpt_tasks.checkpointer.commit import new_write_id
from ckpt_tasks.checkpointer.drain import InlineDrain
from ckpt_tasks.checkpointer.job import JobRunner
from ckpt_tasks.checkpointer.reader import read_commit
from ckpt_tasks.checkpointer.sharded_reader import ShardedCheckpoint, open_sharded
from ckpt_tasks.errors import ObjectExistsError
from ckpt_tasks.fencing.claim import open_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.lineage import Lineage
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import AttemptClaim, LineageEntry, now
from ckpt_tasks.state.rng import capture_rng
from ckpt_tasks.state.sharing import SharingPlanner
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.own import RNG
from ckpt_tasks.training.restore import restored_values
from ckpt_tasks.types import CheckpointId, Position, SaveDecision

LAYOUT = RunLayout("digits")


class Net(nn.Module):
    """Rows that no small number of ranks divides, a layer with fewer rows than ranks, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.two = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.norm(self.one(x))))


def make_net() -> Net:
    torch.manual_seed(7)
    return Net()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0
) -> None:
    """The same batches on every rank, so that gradients are the same in any sharding."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 6, generator=generator)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def exchange(message: bytes) -> list[bytes]:
    """Messages of all ranks."""
    messages: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    return messages


class RankSaver:
    """Saves of one rank, as its trainer and its writer make them together.

    Tensors of `row_blocks` are saved in blocks, of which later saves write those that changed.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        world_size: int,
        exchange: Any = exchange,
        *,
        row_blocks: Sequence[str] = (),
    ) -> None:
        self.store: Store = open_store(str(root), for_writing=True)
        self.rank, self.world_size = rank, world_size
        self.row_blocks = row_blocks
        self.planner = SharingPlanner(rank, world_size, exchange)
        self.failure: Any = lambda: None
        self._runner: JobRunner | None = None
        self._identity = open_run(self.store, LAYOUT, created_by="a test")
        self._claim()
        self._sequence = itertools.count(1)

    def save(self, items: Mapping[str, Any], *, seconds: float = 60) -> CheckpointId:
        """Every rank writes; rank 0 commits. The id."""
        tracked = TrackedItems(self.row_blocks)
        for name, item in items.items():
            tracked.add(name, item)
        number = next(self._sequence)
        request = SaveRequest(
            position=Position(step=number),
            decision=SaveDecision("manual", "a test"),
            number=number,
        )
        state = self.planner.divide(tracked.capture({RNG: capture_rng()}))
        return self._checkpointer(seconds).save(state, request).checkpoint

    def _claim(self) -> None:
        """Of the one attempt that all ranks are of."""
        claim = AttemptClaim(
            uid=self._identity.uid,
            attempt=1,
            claim_id="claim-1",
            invocation="a test",
            process=this_process(),
            claimed_at=now(),
            entrypoint="a test",
            hyperparameters={},
        )
        with contextlib.suppress(ObjectExistsError):
            self.store.create(LAYOUT.attempt(1), encode(claim))

    def _checkpointer(self, seconds: float) -> Checkpointer:
        if self._runner is None or not self.row_blocks:
            self._runner = JobRunner(
                *(self.store, LAYOUT, Fence(self.store, LAYOUT, 1)),
                incremental=bool(self.row_blocks),
                failure=lambda checkpoint: self.failure(),
            )
        return Checkpointer(
            InlineDrain(self._runner),
            self._identity,
            1,
            Lineage((LineageEntry(attempt=1, resumed_from=None),)),
            hyperparameters={},
            environment={},
            unique=lambda: "0123456789ab",
            rank=self.rank,
            world_size=self.world_size,
            gather_seconds=seconds,
        )


def write_id(sequence: int) -> str:
    return new_write_id(1, sequence, "0123456789ab")


def opened(
    root: Path,
    checkpoint: CheckpointId,
    rank: int,
    world_size: int,
    *,
    store: Store | None = None,
) -> ShardedCheckpoint:
    """A checkpoint, as one of `world_size` ranks; read through a `store` of that root."""
    store = store or open_store(str(root))
    record = read_commit(store, LAYOUT, checkpoint)
    return open_sharded(store, LAYOUT, record, rank=rank, world_size=world_size)


def restore(
    root: Path,
    checkpoint: CheckpointId,
    items: Mapping[str, Any],
    rank: int,
    world_size: int,
    *,
    store: Store | None = None,
) -> ShardedCheckpoint:
    start = opened(root, checkpoint, rank, world_size, store=store)
    start.preload()
    tracked = TrackedItems()
    for name, item in items.items():
        tracked.add(name, item)
    values = restored_values(start, [*items, RNG], optimizers=tracked.optimizers({}))
    tracked.restore(values)
    return start


def full(value: Any) -> Any:
    """A state with every DTensor whole, as plain tensors."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        return whole.detach().clone()
    if isinstance(value, dict):
        return {str(key).removeprefix("module."): full(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [full(item) for item in value]
    return value


def full_states(items: Mapping[str, Any]) -> dict[str, Any]:
    return {name: full(item.state_dict()) for name, item in items.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two such states are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return (
            one.dtype is other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _bytes(tensor: torch.Tensor) -> bytes:
    """Also of dtypes that NumPy lacks."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- shardings ------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """For tensor parallel: columns, then rows; three ranks divide none of them evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def make_mlp() -> Mlp:
    torch.manual_seed(7)
    return Mlp()


def sharded(kind: str, module: Any, world_size: int) -> nn.Module:
    """`module`, as `kind` of sharding over all ranks has it."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "plain":
        return module
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    if kind == "fsdp":
        return fully_sharded(module, init_device_mesh("cpu", (world_size,)))
    if kind == "hsdp":  # two replicas, each sharded
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("copy", "shard"))
        return fully_sharded(module, mesh)
    if kind == "tp":
        return tensor_parallel(module, init_device_mesh("cpu", (world_size,)))
    assert kind == "fsdp+tp", kind
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    return fully_sharded(tensor_parallel(module, mesh["tp"]), mesh["dp"])


def fully_sharded(module: Any, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (module.one, module.two):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def tensor_parallel(module: Any, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(module, mesh, {"one": ColwiseParallel(), "two": RowwiseParallel()})


def made(kind: str, world_size: int) -> dict[str, Any]:
    """A fresh module in a sharding, and an optimizer that has not stepped."""
    module = sharded(kind, make_mlp() if "tp" in kind else make_net(), world_size)
    return {"model": module, "optimizer": adam(module)}
