"""The place in an epoch's data, whatever the number of ranks that stop there and that go on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import ResumableDistributedSampler
from ckpt_tasks.errors import StateError
from ckpt_tasks.training.data.loader_kinds import loader_state
from ckpt_tasks.training.data.loaders import LoaderState

KINDS = {"plain": DataLoader, "stateful": StatefulDataLoader}


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def sampler(count: int, ranks: int = 1, rank: int = 0, **how: Any) -> ResumableDistributedSampler:
    return ResumableDistributedSampler(Numbers(count), ranks, rank, **how)


class World:
    """Tracked loaders of several ranks, which do their batches in turn."""

    def __init__(
        self, ranks: int, count: int, batch: int, *, kind: str = "plain", epoch: int = 0, **how: Any
    ) -> None:
        split = {key: how.pop(key) for key in ("seed", "shuffle", "drop_last") if key in how}
        self.states: list[LoaderState] = []
        for rank in range(ranks):
            loader = KINDS[kind](
                Numbers(count), batch, sampler=sampler(count, ranks, rank, **split), **how
            )
            state = loader_state("loader", loader, lambda message: None)
            assert state is not None
            self.states.append(state)
        self.epoch = epoch

    def restore(self, saved: dict[str, Any]) -> World:
        for state in self.states:
            state.load_state_dict(msgspec.json.decode(msgspec.json.encode(saved)))
            state.prepare()
        return self

    def run(self, steps: int | None = None) -> list[int]:
        """Samples in the order of `steps` steps, or of all that are left."""
        iterators: list[Iterator[Any]] = []
        for state in self.states:
            state.begin_epoch(self.epoch)
            iterators.append(state.iterate())
        seen: list[int] = []
        for _ in itertools.count() if steps is None else range(steps):
            batches = [next(iterator, None) for iterator in iterators]
            if batches[0] is None:
                assert batches == [None] * len(batches), "ranks do not do as many batches"
                break
            seen += [int(sample) for batch in batches for sample in batch]
        return seen

    @property
    def saved(self) -> dict[str, Any]:
        states = [state.state_dict() for state in self.states]
        assert all(state == states[0] for state in states), "the place depends on the rank"
        return states[0]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_seen_twice_or_missed(kind: str, before: int, after: int) -> None:
    """N ranks stop in an epoch's midst and M go on, with other batch sizes: each sample once.

    Where the samples that are left do not divide, those of the epoch's beginning fill up.
    """
    for count, steps in itertools.product((24, 25, 29), (0, 1, 3)):
        first = World(before, count, 2, kind=kind, epoch=5)
        seen = first.run(steps)
        assert len(seen) == len(set(seen)) == steps * before * 2
        rest = World(after, count, 3, kind=kind, epoch=5).restore(first.saved).run()
        extra = -(count - len(seen)) % after
        assert len(rest) == count - len(seen) + extra
        times = Counter(seen + rest)
        assert times.keys() == set(range(count))
        assert sum(times.values()) == count + extra


def test_again_and_again_on_another_number_of_ranks() -> None:
    """2, 3, 1 and 2 ranks share one epoch."""
    count, saved, seen = 36, None, list[int]()
    for ranks, steps in ((2, 3), (3, 2), (1, 4), (2, None)):
        world = World(ranks, count, 2)
        if saved is not None:
            world.restore(saved)
        seen += world.run(steps)
        saved = world.saved
    assert sorted(seen) == list(range(count))


def test_the_epoch_is_one_order_for_any_number_of_ranks() -> None:
    """Steps of the same size hold the same samples, and the next epoch has another order."""
    runs = [World(ranks, 24, 12 // ranks, epoch=1).run() for ranks in (1, 2, 3)]
    steps = [[set(run[i : i + 12]) for i in (0, 12)] for run in runs]
    assert steps[0] == steps[1] == steps[2]
    assert World(1, 24, 12, epoch=2).run() != runs[0]
    assert World(1, 24, 12, epoch=0, seed=1).run() != World(1, 24, 12, epoch=1, seed=0).run()
    assert World(1, 24, 12, shuffle=False).run() == list(range(24))


@pytest.mark.parametrize("kind", KINDS)
def test_what_workers_have_fetched_is_not_seen(kind: str) -> None:
    """Workers are batches ahead of the training; the place is the training's."""
    first = World(2, 40, 2, kind=kind, num_workers=2, prefetch_factor=2)
    seen = first.run(3)
    assert first.saved["consumed"] == len(seen) == 12
    rest = World(1, 40, 4, kind=kind, num_workers=2).restore(first.saved).run()
    assert sorted(seen + rest) == list(range(40))


def test_drop_last_leaves_out_less_than_a_sample_for_each_rank() -> None:
    """The sampler's leaves out what does not divide, the loader's incomplete batches."""
    assert len(set(World(3, 23, 7, drop_last=True).run())) == 21
    assert len(World(3, 23, 7, drop_last=True).run()) == 21
    with_batches = World(2, 23, 4)
    loader = DataLoader(Numbers(23), 4, sampler=sampler(23, 2), drop_last=True)
    state = loader_state("loader", loader, lambda message: None)
    assert state is not None
    assert [len(batch) for batch in state.iterate()] == [4, 4, 4]
    assert len(with_batches.run()) == 24


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_sampler_that_groups(size: int) -> None:
    """The sampler within torch's `BatchSampler` is found, and batches of one without any."""
    loader = DataLoader(Numbers(16), batch_sampler=BatchSampler(sampler(16, 2), size, False))
    state = loader_state("loader", loader, lambda message: None)
    assert state is not None
    iterator = state.iterate()
    next(iterator)
    assert state.state_dict()["consumed"] == 2 * size
    single = loader_state(
        "loader", DataLoader(Numbers(16), None, sampler=sampler(16, 2)), lambda message: None
    )
    assert single is not None
    iterator = single.iterate()
    next(iterator)
    assert single.state_dict()["consumed"] == 2


def test_accumulation_knows_the_last_batch_of_a_resharded_epoch() -> None:
    """Batches of the epoch in all: those seen by fewer ranks, and those that are left now."""
    first = World(2, 40, 2)
    first.run(4)
    for ranks, batch in ((1, 4), (3, 2), (2, 2)):
        world = World(ranks, 40, batch).restore(first.saved)
        total = [state.length(4) for state in world.states]
        left = -(-24 // ranks)
        assert total == [4 + -(-left // batch)] * ranks
        assert len(world.run()) == left * ranks
        assert world.states[0].length(0) == math.ceil(math.ceil(40 / ranks) / batch)


def test_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    """A state of before or behind an epoch holds no place."""
    world = World(2, 10, 2)
    world.run()
    for state in world.states:
        state.is_open = False
    assert world.saved["consumed"] == 0
    assert len(World(3, 10, 2, epoch=1).restore(world.saved).run()) == 12


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 4}, "seed was 0, is 4"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"count": 39}, "samples was 40, is 39"),
    ],
)
def test_another_order_is_refused_in_an_epochs_midst(change: dict[str, Any], what: str) -> None:
    """What is left of it cannot be known; at an epoch's end anything may change."""
    first = World(2, 40, 2)
    first.run(3)
    count = change.pop("count", 40)
    with pytest.raises(StateError, match=what):
        World(2, count, 2, **change).restore(first.saved).run()
    for state in first.states:
        state.is_open = False
    assert World(2, count, 2, **change).restore(first.saved).run()


def test_nothing_is_drawn_from_the_global_generators() -> None:
    """An order is made with a generator of its own."""
    before = torch.get_rng_state()
    list(sampler(100, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_must_be_of_the_world() -> None:
    """A mistake in the arguments is told at once."""
    with pytest.raises(ValueError, match="rank 2 of 2 ranks"):
        sampler(10, 2, 2)
