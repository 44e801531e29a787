"""What else writes and reads checkpoints, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckpt_tasks.bench.measure import Contestant
from ckpt_tasks.bench.places import LocalPlace, Place
from ckpt_tasks.state.capture import capture

__all__ = ["DCP_PROCESS", "peers", "state_dicts", "torch_save"]

DCP_PROCESS = "DCP, process"
"""Name of the one whose slow-down of training the others' is compared with."""

_Pair = tuple[Contestant, Contestant]


def peers(
    place: Place, items: Mapping[str, Any]
) -> tuple[list[Contestant], list[Contestant], list[str]]:
    """Their saves to `place`, and loads of what they saved.

    Returns
    -------
    tuple
        Those that save, those that load what was saved, and a word on each that is missing.
    """
    saves, loads, missing = [], [], []
    for make in (_torch, _safetensors, _dcp):
        made = make(place, items)
        if isinstance(made, str):
            missing.append(made)
        else:
            saves.append(made[0])
            loads.append(made[1])
    return saves, loads, missing


def torch_save(place: Place) -> str:
    """Name of the peer that the others are compared with."""
    return f"torch.save{place.suffix}"


def state_dicts(items: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item.state_dict() for name, item in items.items()}


def _torch(place: Place, items: Mapping[str, Any]) -> _Pair:
    name = "peer.pt"

    def save(number: int) -> None:
        with place.write(name) as file:
            torch.save(state_dicts(items), file)

    def load(number: int) -> object:
        with place.read(name) as file:
            return torch.load(file, weights_only=True)

    return _pair(place, torch_save(place), "torch.load", save, load, name)


def _safetensors(place: Place, items: Mapping[str, Any]) -> _Pair | str:
    if importlib.util.find_spec("safetensors") is None:
        return "safetensors: not installed"
    import safetensors.torch as library

    name = "peer.safetensors"

    def tensors() -> dict[str, torch.Tensor]:
        return {f"{image.item}.{image.key}": image.data for image in capture(items).tensors}

    def save(number: int) -> None:
        if isinstance(place, LocalPlace):
            library.save_file(tensors(), place.path(name))
            place.sync(name)
        else:
            with place.write(name) as file:
                file.write(library.save(tensors()))

    def load(number: int) -> object:
        if isinstance(place, LocalPlace):
            return library.load_file(place.path(name))
        with place.read(name) as file:
            return library.load(file.read())

    return _pair(place, f"safetensors{place.suffix}", "safetensors", save, load, name)


def _dcp(place: Place, items: Mapping[str, Any]) -> _Pair | str:
    try:
        from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
        from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

        from ckpt_tasks.bench.dcp_failures import plain_failures
    except ImportError as error:  # a torch that is built without it
        return f"DCP: {error}"

    name = "peer.dcp"

    def save(number: int) -> None:
        with plain_failures():
            dcp_save(state_dicts(items), storage_writer=place.dcp_writer(name), no_dist=True)

    def load(number: int) -> object:
        state = state_dicts(items)
        with plain_failures():
            dcp_load(state, storage_reader=place.dcp_reader(name), no_dist=True)
        return state

    return _pair(place, "DCP", "DCP", save, load, name)


def _pair(
    place: Place,
    saved_by: str,
    loaded_by: str,
    save: Callable[[int], object],
    load: Callable[[int], object],
    name: str,
) -> _Pair:
    return (
        Contestant(name=saved_by, prepare=lambda number: place.remove(name), run=save),
        Contestant(name=loaded_by, prepare=lambda number: place.drop_cache(name), run=load),
    )
