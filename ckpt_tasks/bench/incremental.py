"""Saves of states of which little has changed since the save before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from ckpt_tasks.bench.ours import Ours
from ckpt_tasks.bench.report import Resave
from ckpt_tasks.bench.states import freeze, train
from ckpt_tasks.store.base import Store

__all__ = ["measure_resaves"]

# The share of parameters: of GPT-2 small's 124 million, such adapters have 1.18 million (Hu et al.,
# 2021, "LoRA: Low-Rank Adaptation of Large Language Models").
_TRAINED = {
    "LoRA of rank 8 on every matrix": 0.0095,
    "90 % of the parameters frozen": 0.10,
}


def measure_resaves(store: Store, items: Mapping[str, Any], rounds: int) -> list[Resave]:
    """Of the model in `items`, most of it frozen: a full save, a training step, and a save."""
    return [_measure(store, items, name, rounds) for name in _TRAINED]


def _measure(store: Store, items: Mapping[str, Any], name: str, rounds: int) -> Resave:
    partly = freeze(items, _TRAINED[name])
    ours = Ours(store, partly)
    seconds: list[float] = []
    ratios: list[float] = []
    written: list[float] = []
    try:
        for number in range(rounds + 1):
            ours.renew()
            full, _ = _timed_save(ours, 2 * number)
            train(partly["optimizer"])
            again, share = _timed_save(ours, 2 * number + 1)
            if number:
                seconds.append(again)
                ratios.append(again / full)
                written.append(share)
    finally:
        ours.close()
    return Resave(
        name=name,
        seconds=statistics.median(seconds),
        written=statistics.median(written),
        ratio=statistics.median(ratios),
    )


def _timed_save(ours: Ours, number: int) -> tuple[float, float]:
    """Its seconds, and the share of the checkpoint's bytes that it wrote."""
    began = time.perf_counter()
    record = ours.save(number)
    taken = time.perf_counter() - began
    assert record.written is not None
    return taken, record.written / record.size
