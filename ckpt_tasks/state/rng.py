"""The global random number generators: Python's, NumPy's, torch's on the CPU and on each GPU.

NumPy's is captured when ``numpy.random`` has been imported: before that, nobody can have seeded
it or drawn from it. CUDA's are captured when CUDA has been initialised: doing so for their sake
would take GPU memory from a training that uses none.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from ckpt_tasks.errors import StateError

__all__ = ["capture_rng", "restore_rng"]


def capture_rng() -> dict[str, Any]:
    """The state of all global generators, as plain values and tensors. Draws nothing.

    Returns
    -------
    dict
        ``python`` and ``torch`` always, ``numpy`` and ``cuda`` (a list, by device) where in use.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        # 625 words as one tensor are a hundred times quicker to save than as numbers.
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "torch": torch.get_rng_state(),
    }
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = _plain(numpy_random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


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
