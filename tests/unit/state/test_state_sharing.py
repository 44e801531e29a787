"""The plan of what ranks share: made once, and never waited for in vain twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch

from ckpt_tasks.format.digest import CHUNK_BYTES, chunk_spans, digest, digest_of_chunks
from ckpt_tasks.state.capture import CapturedState, capture
from ckpt_tasks.state.sharing import RankState, SharingPlanner, digests


class Peer:
    """Another rank, which answers with its own message, or not at all."""

    def __init__(self) -> None:
        self.answers = True
        self.asked = 0
        self.message: bytes | None = None

    def __call__(self, message: bytes) -> Sequence[bytes] | None:
        self.asked += 1
        other = message if self.message is None else self.message
        return [message, other] if self.answers else None


def divide(planner: SharingPlanner, captured: CapturedState) -> RankState:
    """As it is when it has been staged."""
    divided = planner.divide(captured)
    offsets = list(accumulate((t.nbytes for t in divided.tensors), initial=0))
    divided.copy_into(memoryview(bytearray(offsets[-1])), offsets[:-1])
    return divided


def state(count: int = 4, *, value: float = 0.0) -> CapturedState:
    tensors = {f"w{number}": torch.full((8 + number,), value) for number in range(count)}
    return capture({"model": tensors, "ckpt_tasks.rng": {"torch": torch.arange(9)}})


def test_equal_tensors_are_written_once_and_planned_once() -> None:
    """Each rank writes about half, and what it leaves is named with the digest of its own bytes."""
    peer = Peer()
    planner = SharingPlanner(0, 2, peer)
    for _ in range(3):
        divided = divide(planner, state())
        assert {t.key for t in divided.tensors} | {s.key for s in divided.shared} >= {
            "w0", "w1", "w2", "w3", "torch"
        }  # fmt: skip
        assert len(divided.shared) == 2
        assert {shared.rank for shared in divided.shared} == {1}
    assert peer.asked == 1
    divide(planner, state(5))
    assert peer.asked == 2, "other tensors need another plan"


def test_other_values_are_not_believed_to_be_the_same() -> None:
    """The digest is of today's values, whatever was equal when the plan was made."""
    planner = SharingPlanner(0, 2, Peer())
    before = {shared.key: shared.digest for shared in divide(planner, state()).shared}
    after = {shared.key: shared.digest for shared in divide(planner, state(value=1.0)).shared}
    assert before.keys() == after.keys()
    assert all(before[key] != after[key] for key in before)


def test_what_differs_is_kept() -> None:
    """Nothing is shared with a rank that holds other values, or other tensors."""
    peer, other = Peer(), Peer()
    divide(SharingPlanner(1, 2, other), state(value=1.0))
    recorded: list[bytes] = []
    SharingPlanner(1, 2, lambda message: recorded.append(message)).divide(state(value=1.0))  # type: ignore[func-returns-value]
    peer.message = recorded[0]
    assert divide(SharingPlanner(0, 2, peer), state()).shared == []


def test_without_an_answer_all_is_written_and_nobody_asked_again() -> None:
    """Until all ranks plan anew: else each save would wait for ranks that have a plan."""
    peer = Peer()
    peer.answers = False
    planner = SharingPlanner(0, 2, peer)
    for _ in range(3):
        divided = divide(planner, state())
        assert divided.shared == []
        assert len(divided.tensors) == 5
    assert peer.asked == 1
    peer.answers = True
    planner.forget()
    assert len(divide(planner, state()).shared) == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3 * CHUNK_BYTES // 4 + 5, dtype=torch.int32),
        torch.ones(7, dtype=torch.bfloat16),
        torch.randn(6, 5).t(),
        torch.tensor(3.0),
        torch.ones(3, dtype=torch.complex128),
    ],
    ids=["chunks", "bfloat16", "transposed", "scalar", "complex"],
)
def test_a_digest_is_that_of_the_bytes_in_the_store(tensor: torch.Tensor) -> None:
    """As the writer computes it, chunk by chunk, of the row-major image."""
    captured = capture({"model": {"w": tensor}})
    data = bytearray(captured.tensors[0].nbytes)
    captured.copy_into(memoryview(data), [0])
    expected = digest_of_chunks(digest(data[i:j]) for i, j in chunk_spans(len(data)))
    assert digests(captured.tensors, [0]) == {0: expected}
