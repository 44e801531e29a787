"""Copying while training goes on already: what only optimizers change, until the next step.

Between a boundary and the next ``optimizer.step()`` lie a forward and a backward pass, which read
parameters and change none. The parameters and the state of the tracked optimizers are copied in
that time, by another thread, and each optimizer's step waits for it; all else (buffers, averaged
weights, schedulers) is copied at the boundary. Something else that changes a parameter meanwhile,
such as weights that are clipped in place, is found by the tensors' version counters
(https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks), but for what
goes through ``.data``, which does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ckpt_tasks.errors import TornStateError
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.state.cuda import moment_of
from ckpt_tasks.state.sharding import local_part
from ckpt_tasks.state.staging import copy_images

__all__ = ["OverlappedState", "StepFence"]


class StepFence:
    """Keeps tracked optimizers from stepping while what they change is being copied."""

    def __init__(self) -> None:
        self._optimizers: list[torch.optim.Optimizer] = []
        self._is_open = threading.Event()
        self._is_open.set()
        self._waits_since: float | None = None

    def watch(self, items: Mapping[str, Any]) -> None:
        """Have each optimizer among the tracked items wait before it steps."""
        for item in items.values():
            if isinstance(item, torch.optim.Optimizer):
                self._optimizers.append(item)
                item.register_step_pre_hook(lambda *_: self._pass())

    def overlap(self, captured: CapturedState) -> OverlappedState:
        """The same state, of which only a part is copied at the boundary."""
        changed = set(self._addresses())
        fenced = {
            position
            for position, image in enumerate(captured.tensors)
            if image.nbytes and image.data.data_ptr() in changed
        }
        for tensor in captured.row_blocks:
            if tensor.position in fenced:
                fenced.update(tensor.positions)
        return OverlappedState(captured, sorted(fenced), self)

    def close(self) -> None:
        """From now on steps wait, until `open`."""
        self._is_open.clear()

    def open(self) -> float:
        """Let steps pass; returns for how many seconds one has waited."""
        since = self._waits_since
        self._is_open.set()
        return 0.0 if since is None else time.perf_counter() - since

    def _pass(self) -> None:
        if not self._is_open.is_set():
            self._waits_since = time.perf_counter()
            self._is_open.wait()
            self._waits_since = None

    def _addresses(self) -> Iterator[int]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from (local_part(parameter).data_ptr() for parameter in group["params"])
            for values in optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        yield local_part(value).data_ptr()


class OverlappedState:
    """A captured state, part of which is still to be copied when training goes on.

    Parameters
    ----------
    fenced
        Positions of the tensors that are copied later, up to the next step.
    """

    def __init__(self, captured: CapturedState, fenced: Sequence[int], fence: StepFence) -> None:
        self._captured = captured
        self._fenced = fenced
        self._fence = fence
        self.trees = captured.trees
        self.tensors = captured.tensors
        self.row_blocks = captured.row_blocks
        self._versions = [self._version(position) for position in fenced]
        self._moment = moment_of(captured.tensors)

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        """Copy what else than a step may change."""
        later = set(self._fenced)
        now = [position for position in range(len(self.tensors)) if position not in later]
        self._copy(now, buffer, offsets)
        self._fence.close()

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        """Copy the rest, and let steps pass; returns for how many seconds one has waited.

        Raises `TornStateError` where something else has changed it.
        """
        try:
            self._copy(self._fenced, buffer, offsets)
            torn = {
                self.tensors[position].name: None
                for position, version in zip(self._fenced, self._versions, strict=True)
                if self._version(position) != version
            }
        finally:
            waited = self._fence.open()
        if torn:
            raise TornStateError(
                f"{', '.join([*torn][:5])} changed outside of an optimizer's step while the state "
                "was being copied; this training cannot use save.overlap"
            )
        return waited

    def find_nonfinite(self, buffer: memoryview, offsets: Sequence[int]) -> list[str]:
        """As `CapturedState.find_nonfinite`."""
        return self._captured.find_nonfinite(buffer, offsets)

    def _copy(self, positions: Sequence[int], buffer: memoryview, offsets: Sequence[int]) -> None:
        copy_images(
            [self.tensors[position] for position in positions],
            buffer,
            [offsets[position] for position in positions],
            self._moment,
        )

    def _version(self, position: int) -> int:
        return self.tensors[position].data._version
