"""Random numbers in loader workers, made a function of what they are for."""

from __future__ import annotations

import random
from collections.abc import Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["SeededDataset"]


class SeededDataset(Dataset[Any]):
    """A map-style data set whose samples' random numbers depend only on (seed, epoch, index).

    Loader workers draw from generators that nobody outside can save. Wrapped in this, a sample
    is made with python's, numpy's and torch's global generators seeded for it, so it comes out
    the same in whichever worker, in whichever attempt; the generators are put back afterwards.

    Parameters
    ----------
    dataset
        Map-style data set, with its random augmentation.
    seed
        Any integer; the same in every attempt.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Shared memory: persistent workers hold a copy of this object made in an earlier epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that samples are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called by `TrainingRun.epochs`, if the loader is tracked, before each epoch's code."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getitem__(self, index: int) -> Any:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        entropy = np.random.SeedSequence([self.seed & (2**64 - 1), self.epoch, index])
        words = entropy.generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
        try:
            return self.dataset[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
