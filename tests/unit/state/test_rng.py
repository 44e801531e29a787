"""The global generators go on where they were captured."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.state.rng import capture_rng, derived_rng, restore_rng

RoundTrip = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def generators_left_alone() -> Any:
    """Puts the generators back that these tests move."""
    state = capture_rng()
    yield
    restore_rng(state)


def draw() -> list[Any]:
    return [
        random.random(),  # noqa: S311
        random.gauss(0, 1),
        np.random.standard_normal(3).tolist(),
        np.random.randint(1000),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


def test_all_generators_go_on_where_they_were(value_through_storage: RoundTrip) -> None:
    """After a restore the same numbers come again, second halves of normal pairs included."""
    random.gauss(0, 1)
    np.random.standard_normal(1)
    state = value_through_storage(capture_rng())
    first = draw()
    draw()
    assert restore_rng(state) == []
    assert draw() == first


def test_capturing_draws_nothing() -> None:
    """Two captures in a row are equal."""
    first, second = capture_rng(), capture_rng()
    assert torch.equal(first["torch"], second["torch"])
    assert torch.equal(first["python"]["words"], second["python"]["words"])
    assert torch.equal(first["numpy"]["state"]["key"], second["numpy"]["state"]["key"])


def test_another_bit_generator_of_numpy_is_kept(value_through_storage: RoundTrip) -> None:
    """A global NumPy generator that the user exchanged is captured too, 128-bit state and all."""
    original = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = value_through_storage(capture_rng())
        first = np.random.standard_normal(3).tolist()
        restore_rng(state)
        assert np.random.standard_normal(3).tolist() == first
    finally:
        np.random.set_bit_generator(original)


def test_numpy_is_not_imported_for_its_state() -> None:
    """A process that never touched numpy.random has no NumPy state, and stays that way."""
    code = (
        "import sys; from ckpt_tasks.state.rng import capture_rng, derived_rng, restore_rng; "
        "state = capture_rng(); assert 'numpy' not in state, state.keys(); "
        "assert 'numpy.random' not in sys.modules; assert restore_rng(state) == []"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_devices_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved with more CUDA devices than there are: one warning says what is not restored."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = {**capture_rng(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    (warning,) = restore_rng(state)
    assert "2 CUDA devices, 0 here" in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", None),
        ("python", {"version": 3, "words": torch.zeros(2, dtype=torch.int64), "gauss": None}),
        ("python", {}),
        ("numpy", {"bit_generator": "Philox"}),
    ],
)
def test_states_that_do_not_fit_are_refused(key: str, value: Any) -> None:
    """A state that a generator does not take raises StateError that names the generator."""
    with pytest.raises(StateError, match="(?i)" + key):
        restore_rng({**capture_rng(), key: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_go_on_where_they_were(value_through_storage: RoundTrip) -> None:
    """Each CUDA device's numbers come again after a restore."""
    torch.rand(1, device="cuda")
    state = value_through_storage(capture_rng())
    assert len(state["cuda"]) == torch.cuda.device_count()
    first = torch.rand(3, device="cuda").tolist()
    assert restore_rng(state) == []
    assert torch.rand(3, device="cuda").tolist() == first


def _draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: S311


def _saved_by(ranks: int, *, alike: bool) -> list[dict[str, Any]]:
    states = []
    for rank in range(ranks):
        seed = 5 if alike else rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states.append(capture_rng())
    return states


def _drawn(state: dict[str, Any]) -> list[float]:
    assert restore_rng(state) == []
    return _draws()


def test_ranks_that_were_there_go_on_and_new_ones_differ_from_all() -> None:
    """The same in every attempt, and nothing is drawn to make it."""
    saved = _saved_by(2, alike=False)
    before = capture_rng()
    derived = [derived_rng(saved, rank) for rank in range(4)]
    again = [derived_rng(saved, rank) for rank in range(4)]
    assert [_drawn(state) for state in derived] == [_drawn(state) for state in again]
    assert [_drawn(state) for state in derived[:2]] == [_drawn(state) for state in saved]
    for generator in zip(*(_drawn(state) for state in derived), strict=True):
        assert len(set(generator)) == 4
    restore_rng(before)
    derived_rng(saved, 3)
    assert torch.equal(torch.get_rng_state(), before["torch"])


def test_generators_that_all_ranks_shared_stay_shared() -> None:
    """As tensor parallel wants them."""
    saved = _saved_by(2, alike=True)
    draws = [_drawn(derived_rng(saved, rank)) for rank in range(3)]
    assert draws == [_drawn(saved[0])] * 3
