"""Copying while training goes on already: what only optimizers change, until the next step.

Between a boundary and the next ``optimizer.step()`` lie a forward and a backward pass, which read
parameters and change none. The parameters and the state of the tracked optimizers are copied in
that time, by another thread, and each optimizer's step waits for it; all else (buffers, averaged
weights, schedulers) is copied at the boundary. Something else that changes a parameter meanwhile,
such as weights that are clipped in place, is found by the tensors' version counters
(https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks), but for what
goes through ``.data``, which does not count.

What another rank writes of such tensors is digested in that time, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ckpt_tasks.errors import TornStateError
from ckpt_tasks.format.records import SharedTensor
from ckpt_tasks.state.capture import CapturedState
from ckpt_tasks.state.cuda import moment_of
from ckpt_tasks.state.sharding import local_part
from ckpt_tasks.state.sharing import RankState
from ckpt_tasks.state.staging import copy_images
from ckpt_tasks.state.tensors import TensorImage

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

    def overlap(self, captured: CapturedState, state: CapturedState) -> OverlappedState:
        """The same state, of which only a part is copied at the boundary.

        Parameters
        ----------
        captured
            All that was captured.
        state
            That, or what this rank writes of it.
        """
        changed = set(self._addresses())
        fenced = {
            position
            for position, image in enumerate(captured.tensors)
            if image.nbytes and image.data.data_ptr() in changed
        }
        for tensor in captured.row_blocks:
            if tensor.position in fenced:
                fenced.update(tensor.positions)
        return OverlappedState(state, {id(captured.tensors[each]) for each in fenced}, self)

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
    state
        The state, perhaps what one rank writes of it.
    fenced
        Which of its images are copied, or digested, later, up to the next step; by `id`.
    """

    def __init__(self, state: CapturedState, fenced: Collection[int], fence: StepFence) -> None:
        self._state = state
        self._fence = fence
        self.trees = state.trees
        self.tensors = state.tensors
        self.row_blocks = state.row_blocks
        self._later = _positions(enumerate(state.tensors), fenced)
        left = state.left if isinstance(state, RankState) else {}
        self._left = set(left)
        self._compared_later = _positions(left.items(), fenced)
        self._versions = [
            (image, image.source._version)
            for image in (
                *(state.tensors[position] for position in self._later),
                *(left[position] for position in self._compared_later),
            )
        ]
        self._moment = moment_of(state.tensors)

    @property
    def shared(self) -> Sequence[SharedTensor]:
        """As `CapturedState.shared`."""
        return self._state.shared

    def copy_into(self, buffer: memoryview, offsets: Sequence[int]) -> None:
        """Copy what else than a step may change."""
        later = set(self._later)
        now = [position for position in range(len(self.tensors)) if position not in later]
        self._copy(now, buffer, offsets)
        self._compare(self._left.difference(self._compared_later))
        self._fence.close()

    def finish_copy(self, buffer: memoryview, offsets: Sequence[int]) -> float:
        """Copy the rest, and let steps pass; returns for how many seconds one has waited.

        Raises `TornStateError` where something else has changed it.
        """
        try:
            self._copy(self._later, buffer, offsets)
            self._compare(self._compared_later)
            torn = {
                image.name: None
                for image, version in self._versions
                if image.source._version != version
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
        return self._state.find_nonfinite(buffer, offsets)

    def _copy(self, positions: Sequence[int], buffer: memoryview, offsets: Sequence[int]) -> None:
        copy_images(
            [self.tensors[position] for position in positions],
            buffer,
            [offsets[position] for position in positions],
            self._moment,
        )

    def _compare(self, positions: Iterable[int]) -> None:
        if isinstance(self._state, RankState):
            self._state.compare(positions)


def _positions(images: Iterable[tuple[int, TensorImage]], chosen: Collection[int]) -> list[int]:
    return [position for position, image in images if id(image) in chosen]
