"""Staging: copying tensors out of the training's way, as fast as memory allows."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ckpt_tasks.state.cuda import Moment, start_copies
from ckpt_tasks.state.tensors import TensorImage

__all__ = ["copy_images"]

_THREADS = min(4, os.cpu_count() or 1)
_ALONE_BYTES = 8 * 1024 * 1024  # below it a second thread costs more than it saves
_PIECE_BYTES = 16 * 1024 * 1024

_Place = tuple[TensorImage, int]
"""An image, and where its bytes begin in the buffer."""

_Piece = tuple[int, int, int]
"""Destination's and source's address, and bytes."""


def copy_images(
    images: Sequence[TensorImage],
    buffer: memoryview,
    offsets: Sequence[int],
    moment: Moment | None = None,
) -> None:
    """Copy each image's bytes to its offset in `buffer`.

    What lies in host memory is copied by several threads, without the interpreter's lock; what
    lies on a CUDA device, meanwhile, by the device.

    Parameters
    ----------
    moment
        Of the devices' values that are wanted; default: now.
    """
    host: list[_Place] = []
    devices: list[_Place] = []
    for image, offset in zip(images, offsets, strict=True):
        if image.nbytes:
            (host if image.data.is_cpu else devices).append((image, offset))
    wait_for_devices = start_copies(devices, buffer, moment)
    for image, offset in devices:
        if not image.data.is_cuda:
            _copy_from_device(image, buffer[offset : offset + image.nbytes])
    pieces = _pieces(host, buffer)
    if sum(size for _, _, size in pieces) < _ALONE_BYTES:
        _copy(pieces)
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="stage") as pool:
            for _ in pool.map(_copy, _shares(pieces)):
                pass
    wait_for_devices()


def _pieces(places: Sequence[_Place], buffer: memoryview) -> list[_Piece]:
    room = buffer.nbytes
    base = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if room else 0
    pieces: list[_Piece] = []
    for image, offset in places:
        size, source = image.nbytes, image.data.data_ptr()
        if offset + size > room:
            raise ValueError(f"{image} does not fit a buffer of {room} bytes at {offset}")
        if size <= _PIECE_BYTES:
            pieces.append((base + offset, source, size))
            continue
        for start in range(0, size, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, size - start)
            pieces.append((base + offset + start, source + start, piece))
    return pieces


def _shares(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """As many lists as threads, of about as many bytes each, neighbours together."""
    least = sum(size for _, _, size in pieces) / _THREADS
    share: list[_Piece] = []
    total = 0
    for piece in pieces:
        share.append(piece)
        total += piece[2]
        if total >= least:
            yield share
            share, total = [], 0
    if share:
        yield share


def _copy(pieces: Sequence[_Piece]) -> None:
    for target, source, size in pieces:
        ctypes.memmove(target, source, size)


def _copy_from_device(image: TensorImage, target: memoryview) -> None:
    flat = image.data.reshape(-1).view(torch.uint8)
    torch.frombuffer(target, dtype=torch.uint8).copy_(flat)
