"""Samples of a `SeededDataset` depend on seed, epoch and index, and on nothing else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ckpt_tasks.training.data.seeding import SeededDataset

SAMPLES = 12


class Noise(Dataset[Any]):
    """Its samples are drawn from all three global generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: S311


class Missing(Noise):
    """One sample cannot be made, after it has drawn."""

    def __getitem__(self, index: int) -> list[float]:
        super().__getitem__(index)
        raise FileNotFoundError(f"sample {index}")


def _samples(dataset: SeededDataset, order: list[int], **options: Any) -> dict[int, list[float]]:
    loader = DataLoader(dataset, batch_size=None, sampler=order, **options)
    return dict(zip(order, loader, strict=True))


def _generators() -> str:
    return repr([random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_order_change_no_sample(workers: int) -> None:
    """Samples made here, one after the other, equal those made backwards in workers."""
    dataset = SeededDataset(Noise(), seed=7)
    here = _samples(dataset, list(range(SAMPLES)))
    there = _samples(dataset, list(range(SAMPLES))[::-1], num_workers=workers)
    assert there == here


def test_persistent_workers_learn_of_a_new_epoch() -> None:
    """They hold a copy of the data set made in an earlier epoch."""
    dataset = SeededDataset(Noise(), seed=7)
    order = list(range(SAMPLES))
    loader = DataLoader(
        dataset, batch_size=None, sampler=order, num_workers=1, persistent_workers=True
    )
    first = list(loader)
    dataset.set_epoch(1)
    second = list(loader)
    assert dataset.epoch == 1
    assert second == [dataset[index] for index in order]
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_each_number_differs_by_index_epoch_and_seed() -> None:
    """From every one of the three generators."""
    dataset, other = SeededDataset(Noise(), seed=7), SeededDataset(Noise(), seed=8)
    made = [dataset[0], dataset[1], other[0]]
    dataset.set_epoch(1)
    made.append(dataset[0])
    for generator in range(3):
        assert len({sample[generator] for sample in made}) == len(made)


def test_any_integer_is_a_seed() -> None:
    """Negative and huge ones too."""
    samples = [SeededDataset(Noise(), seed=seed)[0] for seed in (-1, 0, 2**63, 2**64 - 2)]
    assert len({tuple(sample) for sample in samples}) == len(samples)


@pytest.mark.parametrize("base", [Noise(), Missing()])
def test_the_global_generators_are_put_back(base: Noise) -> None:
    """Making a sample draws nothing from the training's numbers, also where it fails."""
    before = _generators()
    dataset = SeededDataset(base, seed=7)
    if isinstance(base, Missing):
        with pytest.raises(FileNotFoundError):
            dataset[3]
    else:
        dataset[3]
    assert _generators() == before


def test_its_length_is_the_data_sets() -> None:
    """So a sampler sees no difference."""
    assert len(SeededDataset(Noise(), seed=7)) == SAMPLES
