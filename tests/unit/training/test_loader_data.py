"""A place in the midst of an epoch holds for the same data only; an epoch's end for any."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_tasks import TrainingRun
from ckpt_tasks.config import CheckpointConfig, ScheduleConfig, StoreConfig
from ckpt_tasks.errors import StateError
from ckpt_tasks.training.attempt import AttemptRunner
from ckpt_tasks.training.data.loader_data import describe_data
from ckpt_tasks.training.data.loaders import ReplayedLoader
from ckpt_tasks.training.spec import TrainSpec

SAMPLES, BATCH, EPOCHS = 24, 4, 2
PER_EPOCH = SAMPLES // BATCH

KINDS = {"plain": DataLoader, "stateful": StatefulDataLoader}


class Killed(BaseException):
    """The training ends where a test wants it to."""


class Samples(Dataset[int]):
    """As many numbers as it is told."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index >= self.count:
            raise IndexError(index)
        return index


class Endless(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES))

    def __len__(self) -> int:
        return self.length


def attempts(
    *makers: Callable[[], Any], dies_at: int, by_hand: bool = False, every_steps: int = 1
) -> list[int]:
    """One attempt for each maker of a loader, all but the last dying in the step `dies_at`;
    returns the steps that the last one did.
    """
    spec = TrainSpec(
        entrypoint="tests:train",
        run="run",
        invocation="one",
        config=CheckpointConfig(
            store=StoreConfig(url=f"memory://data-{uuid.uuid4().hex}"),
            schedule=ScheduleConfig(every_steps=every_steps, every_epochs=1),
        ),
    )
    done: list[int] = []

    def train(run: TrainingRun) -> None:
        loader = makers[run.attempt - 1]()
        run.track(data=loader)
        for _ in run.epochs(EPOCHS):
            for _ in loader if by_hand else run.steps(loader):
                if run.step == dies_at and run.attempt < len(makers):
                    raise Killed
                done.append(run.step)
                if by_hand:
                    run.step_done()

    for _ in makers[1:]:
        with pytest.raises(Killed):
            AttemptRunner(spec, lambda event: None).execute(train)
    done.clear()
    AttemptRunner(spec, lambda event: None).execute(train)
    return done


def loader(kind: str, samples: int = SAMPLES, **changes: Any) -> Callable[[], Any]:
    options = {"batch_size": BATCH, "shuffle": True, **changes}
    return lambda: KINDS[kind](Samples(samples), **options)


CHANGES = [
    ({"batch_size": 2}, "batch size was 4, is 2"),
    ({"batch_size": 8}, "batch size was 4, is 8"),
    ({"samples": SAMPLES + 5}, "number of samples was 24, is 29"),
    ({"samples": 6}, "number of samples was 24, is 6"),
    ({"drop_last": True}, "drop_last was False, is True"),
    ({"shuffle": False}, "sampler was RandomSampler, is SequentialSampler"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("changes", "says"), CHANGES, ids=[says for _, says in CHANGES])
def test_other_data_in_the_midst_of_an_epoch_are_refused(
    kind: str, changes: dict[str, Any], says: str
) -> None:
    """By name, with both values and what to do, before any step is trained on them."""
    with pytest.raises(StateError, match=says) as error:
        attempts(loader(kind), loader(kind, **changes), dies_at=3)
    assert "checkpoint at an epoch's end with --resume ID" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [changes for changes, _ in CHANGES[:-1]], ids=str)
def test_other_data_from_an_epochs_end_on_are_fine(kind: str, changes: dict[str, Any]) -> None:
    """The next epoch is as long as its data are today."""
    done = attempts(loader(kind), loader(kind, **changes), dies_at=PER_EPOCH, every_steps=100)
    assert done == list(range(PER_EPOCH, PER_EPOCH + len(loader(kind, **changes)())))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_made_again_are_fine(kind: str) -> None:
    """Nothing but the values counts."""
    done = attempts(loader(kind), loader(kind), dies_at=3)
    assert done == list(range(3, 2 * PER_EPOCH))


def test_loops_kept_whole_are_told_at_their_first_step() -> None:
    """Their loaders are at their place before anybody knows that they go on with it."""
    with pytest.raises(StateError, match="number of samples was 24, is 29"):
        attempts(loader("stateful"), loader("stateful", samples=29), dies_at=3, by_hand=True)


def test_a_length_that_is_set_in_the_loop_is_no_change() -> None:
    """A curriculum's data set has its length of that epoch when its batches are asked for."""
    done: list[int] = []
    spec = TrainSpec(
        entrypoint="tests:train",
        run="curriculum",
        invocation="one",
        config=CheckpointConfig(
            store=StoreConfig(url="memory://curriculum"), schedule=ScheduleConfig(every_steps=1)
        ),
    )

    def train(run: TrainingRun) -> None:
        samples = Samples(SAMPLES)
        data = DataLoader(samples, BATCH)
        run.track(data=data)
        for epoch in run.epochs(2):
            samples.count = SAMPLES * (epoch + 1)
            for _ in run.steps(data):
                if run.step == PER_EPOCH + 3 and run.attempt == 1:
                    raise Killed
                done.append(run.step)

    with pytest.raises(Killed):
        AttemptRunner(spec, lambda event: None).execute(train)
    AttemptRunner(spec, lambda event: None).execute(train)
    assert done == list(range(3 * PER_EPOCH))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataLoader(Samples(7), 2), (2, False, "SequentialSampler", 7)),
        (DataLoader(Samples(7), None), (None, False, "SequentialSampler", 7)),
        (
            DataLoader(TensorDataset(torch.zeros(7)), batch_sampler=[[0], [1]]),
            (None, None, "list", 7),
        ),
        (
            DataLoader(Samples(7), 2, sampler=SequentialSampler(Samples(5)), drop_last=True),
            (2, True, "SequentialSampler", 7),
        ),
        (
            StatefulDataLoader(Endless(7), 2),
            (2, False, "_InfiniteConstantSampler", None),
        ),
        (object(), (None, None, None, None)),
    ],
)
def test_what_is_kept_of_a_loader(data: Any, expected: tuple[Any, ...]) -> None:
    """What it shows; an iterable data set's length is an estimate, and others have no data set."""
    assert tuple(describe_data(data).values()) == expected


@pytest.mark.parametrize(("seconds", "told"), [(0.01, 0), (0.4, 1)])
def test_drawing_again_is_told_once_where_it_takes_long(seconds: float, told: int) -> None:
    """Each batch takes `seconds` by the clock; only what goes on after a second is worth words."""
    warnings: list[str] = []
    now = 0.0

    class Slow(Samples):
        def __getitem__(self, index: int) -> int:
            nonlocal now
            now += seconds
            return super().__getitem__(index)

    def state() -> ReplayedLoader:
        data = DataLoader(Slow(SAMPLES), 1, shuffle=True)
        return ReplayedLoader(data, exact=True, warn=warnings.append, clock=lambda: now)

    first = state()
    torch.manual_seed(1)
    batches = first.iterate()
    seen = [int(next(batches)) for _ in range(10)]
    saved = first.state_dict()
    left = [int(batch) for batch in batches]

    second = state()
    second.load_state_dict(saved)
    assert [int(batch) for batch in second.iterate()] == left
    assert sorted(seen + left) == list(range(SAMPLES))
    assert len(warnings) == told
    assert all("drawing the 10 batches again" in warning for warning in warnings)
    assert all("3 so far" in warning for warning in warnings)
