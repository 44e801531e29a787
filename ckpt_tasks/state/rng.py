"""The global random number generators: Python's, NumPy's, torch's on the CPU and on each GPU.

NumPy's is captured when ``numpy.random`` has been imported: before that, nobody can have seeded
it or drawn from it. CUDA's are captured when CUDA has been initialised: doing so for their sake
would take GPU memory from a training that uses none.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ckpt_tasks.errors import StateError
from ckpt_tasks.format.digest import digest

__all__ = ["capture_rng", "derived_rng", "restore_rng"]


def capture_rng() -> dict[str, Any]:
    """The state of all global generators, as plain values and tensors. Draws nothing.

    Returns
    -------
    dict
        ``python`` and ``torch`` always, ``numpy`` and ``cuda`` (a list, by device) where in use.
    """
    state: dict[str, Any] = {
        "python": _python_state(random.getstate()),
        "torch": torch.get_rng_state(),
    }
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = _plain(numpy_random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _python_state(state: Any) -> dict[str, Any]:
    version, words, gauss = state
    # 625 words as one tensor are a hundred times quicker to save than as numbers.
    return {
        "version": version,
        "words": torch.tensor(words, dtype=torch.int64),
        "gauss": gauss,
    }


def restore_rng(state: dict[str, Any]) -> list[str]:
    """Set all global generators to what `capture_rng` returned.

    Parameters
    ----------
    state
        As captured.

    Returns
    -------
    list of str
        What could not be restored on this machine and why, one warning each: another number of
        CUDA devices, no CUDA, no NumPy. Empty if the random numbers go on exactly.

    Raises
    ------
    StateError
        A state that these generators do not take.
    """
    _set("Python's", _restore_python, state.get("python"))
    _set("torch's", lambda value: torch.set_rng_state(value.cpu()), state.get("torch"))
    warnings = []
    if "numpy" in state:
        warnings += _restore_numpy(state["numpy"])
    if "cuda" in state:
        warnings += _restore_cuda(state["cuda"])
    return warnings


def derived_rng(saved: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The generators of a rank where another number of ranks has saved.

    A generator that was the same on all ranks (as tensor parallel wants it) is so again. One
    that differed goes on for a rank that was there before; a rank that is new gets one made from
    rank 0's state and its own number, the same in every attempt.

    Parameters
    ----------
    saved
        From `capture_rng`, by rank.
    rank
        Of this process.

    Returns
    -------
    dict
        As `capture_rng` returns.
    """
    derived = {}
    for name, first in saved[0].items():
        states = [state.get(name) for state in saved]
        if rank < len(states) and states[rank] is not None:
            derived[name] = states[rank]
        elif all(_same(first, state) for state in states):
            derived[name] = first
        else:
            derived[name] = _SEEDED[name](first, _seed(first, rank))
    return derived


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_same(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _seed(state: Any, rank: int) -> int:
    """63 bits that depend on a saved state and a rank."""
    return int(digest(repr((_listed(state), rank)).encode())[:16], 16) >> 1


def _listed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return sorted((key, _listed(item)) for key, item in value.items())
    return [_listed(item) for item in value] if isinstance(value, list) else value


def _seeded_python(saved: Any, seed: int) -> Any:
    return _python_state(random.Random(seed).getstate())  # noqa: S311 - a training's, no secret


def _seeded_numpy(saved: Any, seed: int) -> Any:
    try:
        import numpy
    except ImportError:
        return saved  # `restore_rng` tells
    return _plain(numpy.random.RandomState(seed % 2**32).get_state(legacy=False))


def _seeded_torch(saved: Any, seed: int) -> Any:
    return torch.Generator().manual_seed(seed).get_state()


def _seeded_cuda(saved: Any, seed: int) -> Any:
    """A state on CUDA is a seed and an offset, 8 bytes each, which differ enough by the seed."""
    return [
        torch.tensor([seed + device, 0], dtype=torch.int64).view(torch.uint8)
        for device in range(len(saved))
    ]


_SEEDED: dict[str, Callable[[Any, int], Any]] = {
    "python": _seeded_python,
    "numpy": _seeded_numpy,
    "torch": _seeded_torch,
    "cuda": _seeded_cuda,
}


def _set(whose: str, restore: Callable[[Any], None], value: Any) -> None:
    try:
        restore(value)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise StateError(
            f"{whose} random number generator does not take the saved state: {error}; "
            "restore with the versions it was saved with"
        ) from error


def _restore_python(value: dict[str, Any]) -> None:
    random.setstate((value["version"], tuple(value["words"].tolist()), value["gauss"]))


def _restore_numpy(value: dict[str, Any]) -> list[str]:
    try:
        import numpy
    except ImportError:
        return ["NumPy is not installed here: its random numbers are not restored"]
    _set("NumPy's", lambda saved: numpy.random.set_state(_arrays(saved)), value)
    return []


def _restore_cuda(states: list[torch.Tensor]) -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, saved in enumerate(states[:count]):
        _set(f"CUDA device {device}'s", functools.partial(_set_cuda, device), saved)
    if count == len(states):
        return []
    return [
        f"saved with {len(states)} CUDA devices, {count} here: random numbers of "
        f"{min(count, len(states))} of them are restored, and the training may go another way"
    ]


def _set_cuda(device: int, value: torch.Tensor) -> None:
    torch.cuda.set_rng_state(value.cpu(), device)


def _plain(value: Any) -> Any:
    """NumPy's state with its arrays as tensors of their own and its scalars as numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "dtype"):
        return torch.from_numpy(value.copy()) if value.ndim else value.item()
    return value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value
