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
    wait_for_devices = start_copies(images, buffer, offsets, moment)
    for image, offset in zip(images, offsets, strict=True):
        if image.nbytes and not (image.data.is_cpu or image.data.is_cuda):
            _copy_from_device(image, buffer[offset : offset + image.nbytes])
    pieces = list(_pieces(images, buffer, offsets))
    if sum(size for _, _, size in pieces) < _ALONE_BYTES:
        _copy(pieces)
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="stage") as pool:
            for _ in pool.map(_copy, _shares(pieces)):
                pass
    wait_for_devices()


def _pieces(
    images: Sequence[TensorImage], buffer: memoryview, offsets: Sequence[int]
) -> Iterator[_Piece]:
    if not buffer.nbytes:
        return
    base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for image, offset in zip(images, offsets, strict=True):
        size = image.nbytes
        if not size or not image.data.is_cpu:
            continue
        if offset + size > buffer.nbytes:
            raise ValueError(f"{image} does not fit a buffer of {buffer.nbytes} bytes at {offset}")
        source = image.data.data_ptr()
        for start in range(0, size, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, size - start)
            yield base + offset + start, source + start, piece


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
