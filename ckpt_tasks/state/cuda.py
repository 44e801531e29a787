"""From CUDA devices into the arena: into pinned memory, by a stream of their own.

A copy into pinned memory goes at the speed of the bus and needs no processor; on a stream of its
own it waits for nothing but what has computed the values. Source: CUDA C++ Programming Guide,
"Page-Locked Host Memory" and "Streams".
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ckpt_tasks.state.tensors import TensorImage

__all__ = ["Moment", "moment_of", "start_copies"]

Moment = dict[torch.device, Any]
"""An event for each device: what was launched before it has happened when it is reached."""

_streams: dict[torch.device, Any] = {}
_pinned: dict[int, int] = {}
"""Bytes that are pinned, by their first one's address."""


def moment_of(images: Iterable[TensorImage]) -> Moment:
    """Now, on the current streams of the devices that hold `images`."""
    moment: Moment = {}
    cuda: Any = torch.cuda
    for device in {image.data.device for image in images if image.data.is_cuda}:
        moment[device] = cuda.Event()
        moment[device].record(cuda.current_stream(device))
    return moment


def start_copies(
    places: Iterable[tuple[TensorImage, int]],
    buffer: memoryview,
    moment: Moment | None = None,
) -> Callable[[], None]:
    """Begin to copy those images that are on CUDA devices.

    Parameters
    ----------
    places
        Images, each with where its bytes begin in `buffer`.
    moment
        What must have happened before; default: all that is launched by now.

    Returns
    -------
    Callable
        Waits until they are there.
    """
    on_devices = [(image, at) for image, at in places if image.data.is_cuda and image.nbytes]
    if not on_devices:
        return lambda: None
    _pin(buffer)
    moment = moment_of(image for image, _ in on_devices) if moment is None else moment
    for image, offset in on_devices:
        _start_copy(image, buffer[offset : offset + image.nbytes], moment)
    used = [_streams[device] for device in {image.data.device for image, _ in on_devices}]

    def wait() -> None:
        for stream in used:
            stream.synchronize()

    return wait


def _start_copy(image: TensorImage, target: memoryview, moment: Moment) -> None:
    device = image.data.device
    if device not in _streams:
        cuda: Any = torch.cuda
        _streams[device] = cuda.Stream(device)
    stream = _streams[device]
    stream.wait_event(moment[device])
    with torch.cuda.stream(stream):
        flat = image.data.reshape(-1).view(torch.uint8)
        torch.frombuffer(target, dtype=torch.uint8).copy_(flat, non_blocking=True)
        # Else its memory could be given to somebody else before the copy is done.
        flat.record_stream(stream)


def _pin(buffer: memoryview) -> None:
    """Pin the whole mapping that `buffer` is a part of, once.

    Where the system does not let it be pinned, copies are slower and the same.
    """
    mapping: Any = buffer.obj
    whole = memoryview(mapping)
    address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    if _pinned.get(address) == whole.nbytes:
        return
    if int(_runtime().cudaHostRegister(address, whole.nbytes, 0)) == 0:
        _pinned[address] = whole.nbytes
        weakref.finalize(mapping, _unpin, address)


def _unpin(address: int) -> None:
    _pinned.pop(address, None)
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()
