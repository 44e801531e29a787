"""The health of what was staged: parameters that hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ckpt_tasks.state.tensors import TensorImage, float_dtype

__all__ = ["find_nonfinite"]

_Place = tuple[TensorImage, int]
"""An image, and where its bytes begin in the buffer."""


def find_nonfinite(
    images: Sequence[TensorImage], buffer: memoryview, offsets: Sequence[int]
) -> list[str]:
    """Names (``model.fc.weight``) of the parameters among `images` that hold NaN or infinity.

    Parameters
    ----------
    images
        Those marked as parameters count: a buffer may hold what it likes.
    buffer, offsets
        Where `copy_images` has copied them.
    """
    places = sorted(
        (place for place in zip(images, offsets, strict=True) if _is_checked(place[0])),
        key=lambda place: place[1],
    )
    bad = {
        id(image)
        for run in _runs(places)
        if not _is_finite(run, buffer)
        for image, start in run
        if not _is_finite([(image, start)], buffer)
    }
    return [f"{image.item}.{image.key}" for image in images if id(image) in bad]


def _is_checked(image: TensorImage) -> bool:
    return image.is_parameter and image.nbytes > 0 and float_dtype(image) is not None


def _runs(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Neighbours of one dtype, together: a sum for each of thousands of tensors takes longer."""
    run: list[_Place] = []
    for image, start in places:
        if run:
            last, begin = run[-1]
            if begin + last.nbytes != start or float_dtype(last) is not float_dtype(image):
                yield run
                run = []
        run.append((image, start))
    if run:
        yield run


def _is_finite(run: Sequence[_Place], buffer: memoryview) -> bool:
    (first, start), (last, begin) = run[0], run[-1]
    dtype = float_dtype(first)
    assert dtype is not None, f"{first} was not to be checked"
    values = torch.frombuffer(buffer[start : begin + last.nbytes], dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 1:  # these have no kernels of their own
        values = values.float()
    total = values.sum(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    # A sum is not finite where a value is not; also where it is too large for its dtype.
    return bool(total.isfinite()) or bool(values.isfinite().all())
